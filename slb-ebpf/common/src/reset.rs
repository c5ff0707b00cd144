//! Turns a TCP segment into the reset that answers it (RFC 9293, section 3.10.7.1).

use core::mem::offset_of;

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{
    abi::TCP,
    checksum::{self, Delta},
    frame::Frame,
    parse::{L3, Packet, TcpFlags},
    rewrite,
};

const TCP_LEN: u16 = TcpHdr::LEN as u16;
/// Five words of header, no options.
const DATA_OFFSET: u8 = 5 << 4;

/// Writes the reset over `packet`, from its destination to its source, and gives the frame's new length,
/// to which it has to be cut.
///
/// `None`, with the frame unchanged: nothing answers a reset, and headers behind that of IPv6 would have
/// to go.
#[inline(always)]
pub fn write(frame: &mut Frame<'_>, packet: &Packet) -> Option<usize> {
    let l4 = packet.l4 as usize;
    if packet.key.proto != TCP || packet.flags.intersects(TcpFlags::RST) {
        return None;
    }
    if !packet.is_v4() && l4 != L3 + Ipv6Hdr::LEN {
        return None;
    }
    let old = frame.header::<{ TcpHdr::LEN }>(l4)?;
    let (seq, ack) = (u32::from_be(old.get(4)), old.get::<u32>(8));
    let data_offset = usize::from(old.get::<u8>(12) >> 4) * 4;

    let len = if packet.is_v4() {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3)?;
        let at = offset_of!(Ipv4Hdr, tot_len);
        let total = usize::from(ip.get_be16(at));
        let mut header = Delta::default();
        let new = ((l4 - L3) as u16 + TCP_LEN).to_be();
        header.replace16(ip.get(at), new);
        ip.set(at, new);
        rewrite::reverse_v4(&mut ip, header);
        total.wrapping_sub(l4 - L3)
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3)?;
        let at = offset_of!(Ipv6Hdr, payload_len);
        let payload = usize::from(ip.get_be16(at));
        ip.set(at, TCP_LEN.to_be());
        rewrite::reverse_v6(&mut ip);
        payload
    };
    rewrite::swap_macs(frame)?;

    let has_ack = packet.flags.intersects(TcpFlags::ACK);
    let flags = if has_ack { TcpFlags::RST } else { TcpFlags::RST | TcpFlags::ACK };
    // SYN and FIN count as a byte each.
    let counted = |flag: TcpFlags| u32::from(packet.flags.intersects(flag));
    let data = len.wrapping_sub(data_offset) as u32;
    let end = seq
        .wrapping_add(data)
        .wrapping_add(counted(TcpFlags::SYN))
        .wrapping_add(counted(TcpFlags::FIN));
    let (seq, ack) = if has_ack { (ack, 0) } else { (0, end.to_be()) };
    let mut tcp = frame.header_mut::<{ TcpHdr::LEN }>(l4)?;
    let (sport, dport): (u16, u16) = (tcp.get(0), tcp.get(2));
    tcp.set(0, dport);
    tcp.set(2, sport);
    tcp.set(4, seq);
    tcp.set(8, ack);
    tcp.set(12, DATA_OFFSET);
    tcp.set(13, flags.bits());
    // Window, checksum, urgent pointer.
    tcp.set(14, 0_u16);
    tcp.set(16, 0_u32);
    let header = sum([tcp.get(0), tcp.get(4), tcp.get(8), tcp.get(12)]);
    let pseudo = u64::from((TCP as u16).to_be()) + u64::from(TCP_LEN.to_be());
    let addresses = if packet.is_v4() {
        u64::from(packet.key.src.words()[3]) + u64::from(packet.key.dst.words()[3])
    } else {
        sum(packet.key.src.words()) + sum(packet.key.dst.words())
    };
    tcp.set(offset_of!(TcpHdr, check), !checksum::fold(header + pseudo + addresses));
    Some(l4 + TcpHdr::LEN)
}

#[inline(always)]
const fn sum([a, b, c, d]: [u32; 4]) -> u64 {
    a as u64 + b as u64 + c as u64 + d as u64
}

#[cfg(test)]
mod tests {
    use etherparse::{SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        parse::{self, fixtures::samples},
        rewrite::TTL,
    };

    proptest! {
        #[test]
        fn given_any_segment_when_it_is_reset_then_the_answer_is_that_of_the_rfc(
            sample in samples(),
        ) {
            let before = sample.bytes();
            let mut after = before.clone();
            let mut packet = Packet::default();
            let parsed = parse::packet(&Frame::from_slice(&mut after), &mut packet);
            prop_assert_eq!(parsed, Ok(()));
            let has_extensions = !packet.is_v4() && packet.l4 as usize != L3 + 40;
            let written = write(&mut Frame::from_slice(&mut after), &packet);
            if packet.key.proto != TCP || packet.flags.intersects(TcpFlags::RST) || has_extensions {
                prop_assert_eq!((written, after), (None, before));
                return Ok(());
            }
            after.truncate(written.unwrap());

            let answer = after.clone();
            let found = SlicedPacket::from_ethernet(&answer).unwrap();
            let question = SlicedPacket::from_ethernet(&before).unwrap();
            let (Some(TransportSlice::Tcp(tcp)), Some(TransportSlice::Tcp(asked))) =
                (&found.transport, &question.transport) else { panic!("no TCP") };
            let header = tcp.to_header();
            prop_assert!(header.rst && !header.syn && !header.fin && !header.psh);
            prop_assert_eq!((header.source_port, header.destination_port),
                (asked.destination_port(), asked.source_port()));
            let checksum = match found.net.as_ref().unwrap() {
                etherparse::NetSlice::Ipv4(ip) => {
                    let ip = ip.header();
                    prop_assert_eq!(ip.to_header().calc_header_checksum(), ip.header_checksum());
                    prop_assert_eq!(ip.ttl(), TTL);
                    tcp.calc_checksum_ipv4(ip.source(), ip.destination()).unwrap()
                }
                etherparse::NetSlice::Ipv6(ip) => {
                    prop_assert_eq!(ip.header().hop_limit(), TTL);
                    tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap()
                }
                other @ etherparse::NetSlice::Arp(_) => panic!("{other:?}"),
            };
            prop_assert_eq!(header.checksum, checksum);
            if asked.ack() {
                prop_assert_eq!((header.sequence_number, header.ack),
                    (asked.acknowledgment_number(), false));
            } else {
                let end = asked.sequence_number()
                    .wrapping_add(asked.payload().len() as u32)
                    .wrapping_add(u32::from(asked.syn()) + u32::from(asked.fin()));
                prop_assert_eq!((header.sequence_number, header.ack, header.acknowledgment_number),
                    (0, true, end));
            }
            // It parses as what the VIP would send to the client.
            let mut reparsed = Packet::default();
            let parsed = parse::packet(&Frame::from_slice(&mut after), &mut reparsed);
            prop_assert_eq!((parsed, reparsed.key), (Ok(()), packet.key.reversed()));
        }
    }
}
