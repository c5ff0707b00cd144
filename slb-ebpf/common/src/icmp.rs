//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echo requests are answered, and errors about translated
//! packets are translated to those whom they concern.
//!
//! For frames that [`crate::parse::packet_of`] has rejected as [`crate::parse::Reject::Icmp`]: their IP header is
//! right, and they are no fragments. Extension headers in front of ICMPv6 are not followed.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    abi::{self, Address, FlowKey, NatRewrite, NextHop, TCP, UDP},
    checksum::Delta,
    frame::Frame,
    parse::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, FRAGMENT, L3, Packet, v6_address},
    proxy_protocol::SEQUENCE,
    rewrite,
    verdict::Verdict,
};

pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;
/// Length of an ICMP header of either family, for the messages here.
pub(crate) const LEN: usize = 8;
/// Offset of the checksum in it.
pub(crate) const CHECKSUM: usize = 2;

const ECHO_V4: u8 = 8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// An ICMP message.
struct Message {
    is_v4: bool,
    /// Offset of its header.
    at: usize,
    /// Offset of what follows the IP packet.
    end: usize,
    kind: u8,
}

/// An ICMP error about a TCP or UDP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Quote {
    /// The quoted packet; its transport header's offset is that in the frame, and its flags are not
    /// looked at.
    pub packet: Packet,
    /// Offset of the ICMP header.
    pub(crate) at: u32,
    /// Offset of what follows the IP packet.
    pub(crate) end: u32,
}

#[inline(always)]
fn message(frame: &Frame<'_>) -> Option<Message> {
    let eth = frame.header::<{ EthHdr::LEN }>(0)?;
    let (is_v4, at, end) = match eth.get_be16(offset_of!(EthHdr, ether_type)) {
        ETHERTYPE_IPV4 => {
            let ip = frame.header::<{ Ipv4Hdr::LEN }>(L3)?;
            if ip.get::<u8>(offset_of!(Ipv4Hdr, proto)) != ICMP {
                return None;
            }
            let len = usize::from(ip.get::<u8>(offset_of!(Ipv4Hdr, vihl)) & 0x0f) * 4;
            (true, L3 + len, L3 + usize::from(ip.get_be16(offset_of!(Ipv4Hdr, tot_len))))
        }
        ETHERTYPE_IPV6 => {
            let ip = frame.header::<{ Ipv6Hdr::LEN }>(L3)?;
            if ip.get::<u8>(offset_of!(Ipv6Hdr, next_hdr)) != ICMPV6 {
                return None;
            }
            let at = L3 + Ipv6Hdr::LEN;
            (false, at, at + usize::from(ip.get_be16(offset_of!(Ipv6Hdr, payload_len))))
        }
        _ => return None,
    };
    if at + LEN > end {
        return None;
    }
    let kind = frame.header::<LEN>(at)?.get(0);
    Some(Message { is_v4, at, end, kind })
}

/// Turns an echo request into its reply. `None`, with the frame unchanged: it is none.
///
/// A wrong checksum stays wrong by as much: the sender sees that its request was damaged.
#[inline(always)]
pub fn answer_echo(frame: &mut Frame<'_>) -> Option<()> {
    let Message { is_v4, at, kind, .. } = message(frame)?;
    if kind != if is_v4 { ECHO_V4 } else { ECHO_V6 } {
        return None;
    }
    if is_v4 {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3)?;
        rewrite::reverse_v4(&mut ip, Delta::default());
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3)?;
        // ICMPv6 sums the addresses up, too: in either order.
        rewrite::reverse_v6(&mut ip);
    }
    rewrite::swap_macs(frame)?;
    let mut icmp = frame.header_mut::<LEN>(at)?;
    let mut delta = Delta::default();
    let before = icmp.get(0);
    icmp.set(0, if is_v4 { ECHO_REPLY_V4 } else { ECHO_REPLY_V6 });
    delta.replace16(before, icmp.get(0));
    let checksum = delta.apply(icmp.get(CHECKSUM));
    // An IPv4 reply may be zeros throughout, whose sum cannot be made up for by a zero; its complement is
    // right for any other text as well.
    icmp.set(CHECKSUM, if checksum == 0 { 0xffff } else { checksum });
    Some(())
}

/// The packet that an ICMP error is about, if that is TCP or UDP and its ports are quoted: not if it is
/// a later fragment, or if extension headers other than that of a first fragment precede its transport.
#[must_use]
#[inline(always)]
pub fn quote(frame: &Frame<'_>) -> Option<Quote> {
    let Message { is_v4, at, end, kind } = message(frame)?;
    if !is_error(kind, is_v4) {
        return None;
    }
    let l3 = at + LEN;
    let (src, dst, proto, l4) = if is_v4 {
        let ip = frame.header::<{ Ipv4Hdr::LEN }>(l3)?;
        let version_and_length = ip.get::<u8>(offset_of!(Ipv4Hdr, vihl));
        let header_len = usize::from(version_and_length & 0x0f) * 4;
        let fragment_offset = 0x1fff;
        if version_and_length >> 4 != 4
            || header_len < Ipv4Hdr::LEN
            || ip.get_be16(offset_of!(Ipv4Hdr, frags)) & fragment_offset != 0
        {
            return None;
        }
        let src = Address::from_v4_word(ip.get(offset_of!(Ipv4Hdr, src_addr)));
        let dst = Address::from_v4_word(ip.get(offset_of!(Ipv4Hdr, dst_addr)));
        (src, dst, ip.get(offset_of!(Ipv4Hdr, proto)), l3 + header_len)
    } else {
        let ip = frame.header::<{ Ipv6Hdr::LEN }>(l3)?;
        let src = v6_address(&ip, offset_of!(Ipv6Hdr, src_addr));
        let dst = v6_address(&ip, offset_of!(Ipv6Hdr, dst_addr));
        if ip.get::<u8>(0) >> 4 != 6 || src.is_v4() || dst.is_v4() {
            return None;
        }
        let mut proto: u8 = ip.get(offset_of!(Ipv6Hdr, next_hdr));
        let mut l4 = l3 + Ipv6Hdr::LEN;
        if proto == FRAGMENT {
            let fragment = frame.header::<8>(l4)?;
            let fragment_offset = 0xfff8;
            if fragment.get_be16(2) & fragment_offset != 0 {
                return None;
            }
            proto = fragment.get(0);
            l4 += 8;
        }
        (src, dst, proto, l4)
    };
    let proto = u32::from(proto);
    if !matches!(proto, TCP | UDP) || l4 + 4 > end {
        return None;
    }
    let ports = frame.header::<4>(l4)?;
    let key = FlowKey { src, dst, sport: ports.get_be16(0), dport: ports.get_be16(2), proto };
    let packet = Packet { key, l4: l4 as u32, v4: is_v4.into(), ..Packet::default() };
    Some(Quote { packet, at: at as u32, end: end as u32 })
}

/// Destination unreachable, time exceeded, parameter problem, and ICMPv6's packet too big. Source quench
/// is not to be reacted to (RFC 6633), and a redirect is for the gateway itself.
#[inline(always)]
const fn is_error(kind: u8, is_v4: bool) -> bool {
    if is_v4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) }
}

/// Translates an error to whom it concerns, and makes it ready for the wire as [`rewrite::translate`]
/// does. Ports of `to` are those that the quoted packet is to have.
///
/// An error about what a backend has sent goes to the backend (`to` is no reply): its address becomes
/// the quoted source and the error's destination. One about what a client has sent goes to the client:
/// the VIP becomes the quoted destination, and the error's source if the backend itself is that; a
/// router on the way speaks for itself.
///
/// `peer`: whom the quoted packet is to have at its other end, where that may be a source of ours: what the
/// backend sees as source, or the client, who then is the error's destination.
///
/// # Errors
///
/// [`Verdict::TtlExpired`], with the frame unchanged. [`Verdict::Truncated`] cannot happen to a frame
/// that `quote` is of.
#[inline(always)]
pub fn translate_error(
    frame: &mut Frame<'_>,
    quote: &Quote,
    to: &NatRewrite,
    peer: Address,
    hop: NextHop,
) -> Result<(), Verdict> {
    let mut icmp = Delta::default();
    let receiver = if to.is_reply() { peer } else { to.addr };
    if quote.packet.is_v4() {
        outer_v4(frame, quote, to, receiver, hop.is_known())?;
    } else {
        outer_v6(frame, quote, to, receiver, hop.is_known(), &mut icmp)?;
    }
    quoted(frame, quote, to, peer, &mut icmp)?;
    let mut header = frame.header_mut::<LEN>(quote.at as usize).ok_or(Verdict::Truncated)?;
    let checksum = header.get(CHECKSUM);
    header.set(CHECKSUM, icmp.apply(checksum));
    if hop.is_known() {
        rewrite::address(frame, hop)?;
    }
    Ok(())
}

/// Makes an error about one of the packets that `len` bytes were put into ([`crate::proxy_protocol`]) one
/// about what the client has sent: how much of it fits, and its sequence number if a header was put before
/// `first`, the number of the client's first byte. Others are left alone.
#[inline(always)]
pub fn recount(frame: &mut Frame<'_>, quote: &Quote, first: Option<u32>, len: u32) -> Option<()> {
    let (at, l4) = (quote.at as usize, quote.packet.l4 as usize);
    if l4 + SEQUENCE + 4 > quote.end as usize {
        return None;
    }
    let mut delta = Delta::default();
    let mut tcp = frame.header_mut::<{ SEQUENCE + 4 }>(l4)?;
    let before: u32 = tcp.get(SEQUENCE);
    if let Some(first) = first {
        // The SYN, the header, or what follows in the same segment: not the client's next.
        let is_told = first.wrapping_sub(u32::from_be(before)).wrapping_sub(1) <= len;
        if !is_told {
            return None;
        }
        let after = u32::from_be(before).wrapping_add(len).to_be();
        tcp.set(SEQUENCE, after);
        delta.replace32(before, after);
    }
    let mut icmp = frame.header_mut::<LEN>(at)?;
    // An MTU stands at the end of the ICMP header in either family: nothing is wider than 16 bits.
    let is_too_big =
        if quote.packet.is_v4() { icmp.get_be16(0) == 0x0304 } else { icmp.get_be16(0) == 0x0200 };
    let mtu = icmp.get_be16(6);
    if is_too_big && u32::from(mtu) > len {
        let less = (mtu - len as u16).to_be();
        icmp.set(6, less);
        delta.replace16(mtu.to_be(), less);
    }
    let checksum = icmp.get(CHECKSUM);
    icmp.set(CHECKSUM, delta.apply(checksum));
    Some(())
}

#[inline(always)]
fn outer_v4(
    frame: &mut Frame<'_>,
    quote: &Quote,
    to: &NatRewrite,
    receiver: Address,
    is_sent: bool,
) -> Result<(), Verdict> {
    let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
    let mut header = Delta::default();
    if is_sent {
        rewrite::decrement_ttl_v4(&mut ip, &mut header)?;
    }
    let (src, dst) = (offset_of!(Ipv4Hdr, src_addr), offset_of!(Ipv4Hdr, dst_addr));
    let [_, _, _, backend] = quote.packet.key.dst.words();
    if to.is_reply() && ip.get::<u32>(src) == backend {
        let [_, _, _, new] = to.addr.words();
        header.replace32(ip.get(src), new);
        ip.set(src, new);
    }
    let [_, _, _, new] = receiver.words();
    header.replace32(ip.get(dst), new);
    ip.set(dst, new);
    let checksum = ip.get(offset_of!(Ipv4Hdr, check));
    ip.set(offset_of!(Ipv4Hdr, check), header.apply(checksum));
    Ok(())
}

#[inline(always)]
fn outer_v6(
    frame: &mut Frame<'_>,
    quote: &Quote,
    to: &NatRewrite,
    receiver: Address,
    is_sent: bool,
    icmp: &mut Delta,
) -> Result<(), Verdict> {
    let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
    if is_sent {
        rewrite::decrement_ttl_v6(&mut ip)?;
    }
    // ICMPv6 sums the addresses up, too (RFC 4443, section 2.3).
    let src = offset_of!(Ipv6Hdr, src_addr);
    if to.is_reply() && v6_address(&ip, src).same(quote.packet.key.dst) {
        rewrite::replace_v6(&mut ip, src, to.addr, icmp);
    }
    rewrite::replace_v6(&mut ip, offset_of!(Ipv6Hdr, dst_addr), receiver, icmp);
    Ok(())
}

/// Translates the quoted packet, and notes in `icmp` what has changed there.
#[inline(always)]
fn quoted(
    frame: &mut Frame<'_>,
    quote: &Quote,
    to: &NatRewrite,
    peer: Address,
    icmp: &mut Delta,
) -> Result<(), Verdict> {
    let l3 = quote.at as usize + LEN;
    let mut transport = Delta::default();
    if quote.packet.is_v4() {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(l3).ok_or(Verdict::Truncated)?;
        let (src, dst) = (offset_of!(Ipv4Hdr, src_addr), offset_of!(Ipv4Hdr, dst_addr));
        let (at, other) = if to.is_reply() { (dst, src) } else { (src, dst) };
        let [_, _, _, new] = to.addr.words();
        transport.replace32(ip.get(at), new);
        ip.set(at, new);
        let [_, _, _, new] = peer.words();
        transport.replace32(ip.get(other), new);
        ip.set(other, new);
        let checksum = ip.get(offset_of!(Ipv4Hdr, check));
        // The address and the checksum that makes up for it: the sum over the header stays.
        ip.set(offset_of!(Ipv4Hdr, check), transport.apply(checksum));
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(l3).ok_or(Verdict::Truncated)?;
        let (src, dst) = (offset_of!(Ipv6Hdr, src_addr), offset_of!(Ipv6Hdr, dst_addr));
        let (at, other) = if to.is_reply() { (dst, src) } else { (src, dst) };
        rewrite::replace_v6(&mut ip, at, to.addr, &mut transport);
        rewrite::replace_v6(&mut ip, other, peer, &mut transport);
        *icmp = icmp.plus(transport);
    }
    let l4 = quote.packet.l4 as usize;
    let mut ports = frame.header_mut::<4>(l4).ok_or(Verdict::Truncated)?;
    let (old, new) = (ports.get(0), abi::port_word(to.sport, to.dport));
    ports.set(0, new);
    transport.replace32(old, new);
    icmp.replace32(old, new);

    let is_udp = quote.packet.key.proto == UDP;
    let at = l4 + if is_udp { offset_of!(UdpHdr, check) } else { offset_of!(TcpHdr, check) };
    if at + 2 > quote.end as usize {
        // RFC 792 asks for the first 8 bytes only.
        return Ok(());
    }
    let mut field = frame.header_mut::<2>(at).ok_or(Verdict::Truncated)?;
    let old: u16 = field.get(0);
    let new = if is_udp { transport.apply_udp(old) } else { transport.apply(old) };
    field.set(0, new);
    icmp.replace16(old, new);
    Ok(())
}

#[cfg(test)]
mod tests;
