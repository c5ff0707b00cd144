//! Makes the message that a packet cannot be delivered: too big for the next hop (ICMP's *fragmentation
//! needed* with the MTU, RFC 1191; ICMPv6's *packet too big*, RFC 8201), or no socket listens there.
//!
//! The packet becomes the quote in its own answer, as it arrived: its frame is cut to [`quoted_len`],
//! grown by [`HEAD_V4`] or [`HEAD_V6`] at its head, and [`write()`] fills that.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    checksum,
    frame::{Frame, REACH},
    icmp::{self, ICMP, ICMPV6},
    parse::{DONT_FRAGMENT, ETHERTYPE_IPV4, ETHERTYPE_IPV6, L3, Packet, v6_address},
    rewrite::{self, TTL},
};

/// How much longer than the quote an answer to an IPv4 packet is.
pub const HEAD_V4: usize = Ipv4Hdr::LEN + icmp::LEN;
/// The same for IPv6.
pub const HEAD_V6: usize = Ipv6Hdr::LEN + icmp::LEN;

/// What every IPv4 host takes (RFC 1812, section 4.3.2.3).
const MAX_V4: usize = 576 - HEAD_V4;
/// The smallest MTU of IPv6 (RFC 4443, section 2.4).
const MAX_V6: usize = 1_280 - HEAD_V6;
/// Words of 32 bits in the longest ICMP message.
const MAX_WORDS: usize = (icmp::LEN + MAX_V6) / 4;
const _: () = assert!(L3 + HEAD_V6 + MAX_V6 <= REACH);

/// Internetwork control, as Linux marks its errors (RFC 1812, section 4.3.2.5).
pub(crate) const TOS: u8 = 0xc0;

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It is longer than the next hop's MTU, in bytes from the IP header on.
    TooBig(u16),
    /// No socket listens at its port.
    PortUnreachable,
}

impl Problem {
    /// Type and code of the message, and the second word of its header.
    #[inline(always)]
    const fn words(self, is_v4: bool) -> [u32; 2] {
        match (self, is_v4) {
            (Self::TooBig(mtu), true) => [0x0304_0000, mtu as u32],
            (Self::TooBig(mtu), false) => [0x0200_0000, mtu as u32],
            (Self::PortUnreachable, true) => [0x0303_0000, 0],
            (Self::PortUnreachable, false) => [0x0104_0000, 0],
        }
    }
}

/// Whether the sender of a packet that is too big is to be told, and not the packet to be fragmented.
#[must_use]
#[inline(always)]
pub fn is_to_be_told(frame: &Frame<'_>, packet: &Packet) -> bool {
    !packet.is_v4()
        || frame.header::<{ Ipv4Hdr::LEN }>(L3).is_some_and(|ip| {
            u32::from(ip.get_be16(offset_of!(Ipv4Hdr, frags))) & DONT_FRAGMENT != 0
        })
}

/// The length that the frame of a packet has to be cut to. A multiple of 4 is quoted, so that nothing is
/// left over when it is summed up.
#[must_use]
#[inline(always)]
pub const fn quoted_len(packet: &Packet) -> usize {
    let max = if packet.is_v4() { MAX_V4 } else { MAX_V6 };
    let len = packet.len as usize;
    L3 + if len < max { len & !3 } else { max }
}

/// Writes the message to the quoted packet's source, from its destination, in front of the quote.
///
/// `None`: the frame was not made ready for it.
#[inline(always)]
pub fn write(frame: &mut Frame<'_>, is_v4: bool, problem: Problem) -> Option<()> {
    if is_v4 { write_v4(frame, problem) } else { write_v6(frame, problem) }
}

#[inline(always)]
fn write_v4(frame: &mut Frame<'_>, problem: Problem) -> Option<()> {
    ethernet(frame, HEAD_V4, ETHERTYPE_IPV4)?;
    let len = frame.len().wrapping_sub(L3) as u32;
    let quoted = frame.header::<{ Ipv4Hdr::LEN }>(L3 + HEAD_V4)?;
    let src: u32 = quoted.get(offset_of!(Ipv4Hdr, src_addr));
    let dst: u32 = quoted.get(offset_of!(Ipv4Hdr, dst_addr));
    let words = [
        (0x45 << 24 | u32::from(TOS) << 16 | len).to_be(),
        // Needs no identification, then (RFC 6864).
        DONT_FRAGMENT.to_be(),
        (u32::from(TTL) << 24 | u32::from(ICMP) << 16).to_be(),
        dst,
        src,
    ];
    rewrite::write_v4(frame, words)?;

    message(frame, L3 + Ipv4Hdr::LEN, problem.words(true), 0)
}

#[inline(always)]
fn write_v6(frame: &mut Frame<'_>, problem: Problem) -> Option<()> {
    ethernet(frame, HEAD_V6, ETHERTYPE_IPV6)?;
    let len = frame.len().wrapping_sub(L3 + Ipv6Hdr::LEN) as u16;
    let quoted = frame.header::<{ Ipv6Hdr::LEN }>(L3 + HEAD_V6)?;
    let src = v6_address(&quoted, offset_of!(Ipv6Hdr, src_addr)).words();
    let dst = v6_address(&quoted, offset_of!(Ipv6Hdr, dst_addr)).words();
    let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3)?;
    ip.set(0, (6_u32 << 28 | u32::from(TOS) << 20).to_be());
    ip.set(offset_of!(Ipv6Hdr, payload_len), len.to_be());
    ip.set(offset_of!(Ipv6Hdr, next_hdr), ICMPV6);
    ip.set(offset_of!(Ipv6Hdr, hop_limit), TTL);
    let mut pseudo = u64::from(len.to_be()) + u64::from(u16::from(ICMPV6).to_be());
    for (word, (src, dst)) in [0, 4, 8, 12].into_iter().zip(src.into_iter().zip(dst)) {
        ip.set(offset_of!(Ipv6Hdr, src_addr) + word, dst);
        ip.set(offset_of!(Ipv6Hdr, dst_addr) + word, src);
        pseudo += u64::from(src) + u64::from(dst);
    }
    message(frame, L3 + Ipv6Hdr::LEN, problem.words(false), pseudo)
}

/// The Ethernet header of an answer, from that of the question, which is `head` bytes behind.
#[inline(always)]
fn ethernet(frame: &mut Frame<'_>, head: usize, ethertype: u16) -> Option<()> {
    let old = frame.header::<{ EthHdr::LEN }>(head)?;
    let words = [6, 8, 10, 0, 2, 4].map(|at| old.get::<u16>(at));
    let mut new = frame.header_mut::<{ EthHdr::LEN }>(0)?;
    for (at, word) in [0, 2, 4, 6, 8, 10].into_iter().zip(words) {
        new.set(at, word);
    }
    new.set(offset_of!(EthHdr, ether_type), ethertype.to_be());
    Some(())
}

/// The ICMP header, summed up with the quote and with `sum`.
#[inline(always)]
fn message(
    frame: &mut Frame<'_>,
    at: usize,
    [type_and_code, rest]: [u32; 2],
    mut sum: u64,
) -> Option<()> {
    let mut icmp = frame.header_mut::<{ icmp::LEN }>(at)?;
    icmp.set(0, type_and_code.to_be());
    icmp.set(4, rest.to_be());
    for word in 0..MAX_WORDS {
        let Some(word) = frame.header::<4>(at + 4 * word) else { break };
        sum += u64::from(word.get::<u32>(0));
    }
    frame.header_mut::<{ icmp::LEN }>(at)?.set(icmp::CHECKSUM, !checksum::fold(sum));
    Some(())
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, vec, vec::Vec};

    use etherparse::{
        IpDscp, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header,
        PacketBuilder,
    };
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        icmp::quote,
        parse::{
            self,
            fixtures::{DESTINATION_MAC, SOURCE_MAC, Sample, samples},
        },
    };

    fn packet_in(bytes: &mut [u8]) -> Packet {
        let mut packet = Packet::default();
        parse::packet(&Frame::from_slice(bytes), &mut packet).unwrap();
        packet
    }

    /// A packet that may not be fragmented.
    fn whole(sample: &Sample) -> Vec<u8> {
        let mut bytes = sample.bytes();
        if sample.dst.is_ipv4() {
            let mut ip = Ipv4Header::from_slice(&bytes[L3..]).unwrap().0;
            ip.dont_fragment = true;
            ip.header_checksum = ip.calc_header_checksum();
            let ip = ip.to_bytes();
            bytes[L3..][..ip.len()].copy_from_slice(&ip);
        }
        bytes
    }

    /// What the program does around `write`.
    fn answered(bytes: &[u8], problem: Problem) -> Option<Vec<u8>> {
        let mut cut = bytes.to_vec();
        let packet = packet_in(&mut cut);
        cut.truncate(quoted_len(&packet));
        let mut grown = vec![0xee; if packet.is_v4() { HEAD_V4 } else { HEAD_V6 }];
        grown.extend(cut);
        write(&mut Frame::from_slice(&mut grown), packet.is_v4(), problem)?;
        Some(grown)
    }

    /// What another implementation makes of it.
    fn expected(sample: &Sample, bytes: &[u8], problem: Problem) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2(DESTINATION_MAC, SOURCE_MAC);
        let ([code_v4, kind_v6, code_v6], rest) = match problem {
            Problem::TooBig(mtu) => ([4, 2, 0], u32::from(mtu).to_be_bytes()),
            Problem::PortUnreachable => ([3, 1, 4], [0; 4]),
        };
        let packet = &bytes[L3..bytes.len() - sample.padding];
        let quote = |max: usize| &packet[..(packet.len() & !3).min(max)];
        let mut expected = Vec::new();
        match (sample.src, sample.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let number = IpNumber(0);
                let mut ip = Ipv4Header::new(0, 64, number, dst.octets(), src.octets()).unwrap();
                ip.dscp = IpDscp::CS6;
                ip.dont_fragment = true;
                ethernet
                    .ip(IpHeaders::Ipv4(ip, Ipv4Extensions::default()))
                    .icmpv4_raw(3, code_v4, rest)
                    .write(&mut expected, quote(548))
                    .unwrap();
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let ip = Ipv6Header {
                    traffic_class: 48 << 2,
                    hop_limit: 64,
                    source: dst.octets(),
                    destination: src.octets(),
                    ..Ipv6Header::default()
                };
                ethernet
                    .ip(IpHeaders::Ipv6(ip, Ipv6Extensions::default()))
                    .icmpv6_raw(kind_v6, code_v6, rest)
                    .write(&mut expected, quote(1_232))
                    .unwrap();
            }
            families => panic!("two families: {families:?}"),
        }
        expected
    }

    proptest! {
        #[test]
        fn given_any_packet_when_it_cannot_be_delivered_then_its_sender_learns_why(
            sample in samples(),
            payload in vec(any::<u8>(), 0..1_600),
            problem in prop_oneof![
                any::<u16>().prop_map(Problem::TooBig),
                Just(Problem::PortUnreachable),
            ],
        ) {
            let sample = Sample { payload, ..sample };
            let bytes = whole(&sample);
            prop_assert_eq!(answered(&bytes, problem), Some(expected(&sample, &bytes, problem)));
        }

        #[test]
        fn given_a_large_packet_when_it_is_too_big_then_the_answer_fits_everywhere_and_names_the_flow(
            sample in samples(),
            len in 1_280..9_000_usize,
        ) {
            let sample =
                Sample { payload: vec![7; len], extensions: Ipv6Extensions::default(), ..sample };
            let mut answer = answered(&whole(&sample), Problem::TooBig(1_400)).unwrap();
            let is_v4 = sample.dst.is_ipv4();
            prop_assert_eq!(answer.len(), L3 + if is_v4 { 576 } else { 1_280 });
            let quote = quote(&Frame::from_slice(&mut answer)).unwrap();
            prop_assert_eq!(quote.packet.key, sample.expected().key);
        }

        #[test]
        fn given_a_frame_that_was_not_made_ready_when_written_then_nothing_happens_beyond_its_end(
            sample in samples(),
            len in 0..120_usize,
            is_v4 in any::<bool>(),
        ) {
            let whole = whole(&sample);
            let mut bytes = whole.clone();
            let len = len.min(whole.len());
            let problem = Problem::TooBig(1_400);
            let written = write(&mut Frame::from_slice(&mut bytes[..len]), is_v4, problem);
            let least = if is_v4 { L3 + HEAD_V4 + 20 } else { L3 + HEAD_V6 + 40 };
            prop_assert_eq!(written.is_some(), len >= least);
            prop_assert_eq!(&bytes[len..], &whole[len..]);
        }
    }

    #[test]
    fn given_an_ipv4_packet_that_may_be_fragmented_when_it_is_too_big_then_nobody_is_told() {
        let is_told = |bytes: &mut [u8]| {
            let packet = packet_in(bytes);
            is_to_be_told(&Frame::from_slice(bytes), &packet)
        };
        let mut bytes = whole(&Sample::default());
        assert!(is_told(&mut bytes));
        let mut ip = Ipv4Header::from_slice(&bytes[L3..]).unwrap().0;
        ip.dont_fragment = false;
        ip.header_checksum = ip.calc_header_checksum();
        bytes[L3..L3 + 20].copy_from_slice(&ip.to_bytes());
        assert!(!is_told(&mut bytes));
    }
}
