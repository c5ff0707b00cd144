//! Writes a flow's translation into a frame, checksums included.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    abi::{self, Address, NatRewrite, NatTuple, NextHop, TCP},
    checksum::{self, Delta},
    frame::{Frame, Header},
    parse::{L3, Packet},
    verdict::Verdict,
};

/// What an answer begins its way with.
pub(crate) const TTL: u8 = 64;

/// Translates addresses and ports of `packet` as `to` says, and makes it ready for the wire: TTL one
/// less, and the MAC addresses of `hop`. Both are the kernel's business if it has to find the hop.
///
/// # Errors
///
/// [`Verdict::TtlExpired`], with the frame unchanged. [`Verdict::Truncated`] cannot happen to a packet
/// that [`crate::parse::packet_of`] has accepted, but the verifier does not know.
#[inline(always)]
pub fn translate(
    frame: &mut Frame<'_>,
    packet: &Packet,
    to: &NatRewrite,
    hop: NextHop,
) -> Result<(), Verdict> {
    let mut transport = Delta::default();
    if packet.is_v4() {
        network_v4(frame, to, hop.is_known(), &mut transport)?;
    } else {
        network_v6(frame, to, hop.is_known(), &mut transport)?;
    }
    ports(frame, packet, to, transport)?;
    if hop.is_known() {
        address(frame, hop)?;
    }
    Ok(())
}

/// As [`translate`], but replaces both ends. They are of the packet's family.
///
/// # Errors
///
/// As those of [`translate`].
#[inline(always)]
pub fn translate_ends(
    frame: &mut Frame<'_>,
    packet: &Packet,
    ends: &NatTuple,
    hop: NextHop,
) -> Result<(), Verdict> {
    let mut delta = Delta::default();
    if packet.is_v4() {
        let (from, to) = (packet.key.src.words(), packet.key.dst.words());
        delta.replace32(from[3], ends.src.words()[3]);
        delta.replace32(to[3], ends.dst.words()[3]);
    } else {
        delta.replace_address(packet.key.src, ends.src);
        delta.replace_address(packet.key.dst, ends.dst);
    }
    // Its addresses are those that were parsed.
    translate_later(frame, packet, [ends.src, ends.dst], hop)?;
    write_ports(frame, packet, ends.port_word(), delta)
}

/// Translates the addresses of a later fragment, which has nothing else: the first has the checksum.
///
/// # Errors
///
/// As those of [`translate`].
#[inline(always)]
pub fn translate_later(
    frame: &mut Frame<'_>,
    packet: &Packet,
    [src, dst]: [Address; 2],
    hop: NextHop,
) -> Result<(), Verdict> {
    let is_sent = hop.is_known();
    if packet.is_v4() {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
        let mut header = Delta::default();
        if is_sent {
            decrement_ttl_v4(&mut ip, &mut header)?;
        }
        let ends = [(offset_of!(Ipv4Hdr, src_addr), src), (offset_of!(Ipv4Hdr, dst_addr), dst)];
        for (at, addr) in ends {
            let [_, _, _, new] = addr.words();
            header.replace32(ip.get(at), new);
            ip.set(at, new);
        }
        let checksum = ip.get(offset_of!(Ipv4Hdr, check));
        ip.set(offset_of!(Ipv4Hdr, check), header.apply(checksum));
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
        if is_sent {
            decrement_ttl_v6(&mut ip)?;
        }
        let mut nowhere = Delta::default();
        replace_v6(&mut ip, offset_of!(Ipv6Hdr, src_addr), src, &mut nowhere);
        replace_v6(&mut ip, offset_of!(Ipv6Hdr, dst_addr), dst, &mut nowhere);
    }
    if is_sent {
        address(frame, hop)?;
    }
    Ok(())
}

/// Sends a packet on as it is, but for its TTL and the MAC addresses of `hop`: the receiver has the
/// destination address as well, and answers by itself.
///
/// # Errors
///
/// As those of [`translate`].
#[inline(always)]
pub fn rewrite_l2(frame: &mut Frame<'_>, packet: &Packet, hop: NextHop) -> Result<(), Verdict> {
    if packet.is_v4() {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
        let mut header = Delta::default();
        decrement_ttl_v4(&mut ip, &mut header)?;
        let checksum = ip.get(offset_of!(Ipv4Hdr, check));
        ip.set(offset_of!(Ipv4Hdr, check), header.apply(checksum));
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
        decrement_ttl_v6(&mut ip)?;
    }
    address(frame, hop)
}

/// Sends a frame back where it came from.
#[inline(always)]
pub(crate) fn swap_macs(frame: &mut Frame<'_>) -> Option<()> {
    let mut eth = frame.header_mut::<{ EthHdr::LEN }>(0)?;
    for word in [0, 2, 4] {
        let (to, from): (u16, u16) = (eth.get(word), eth.get(6 + word));
        eth.set(word, from);
        eth.set(6 + word, to);
    }
    Some(())
}

/// Makes an answer's header of a question's: addresses swapped, [`TTL`], `delta` noted.
#[inline(always)]
pub(crate) fn reverse_v4(ip: &mut Header<'_, { Ipv4Hdr::LEN }>, mut delta: Delta) {
    let at = offset_of!(Ipv4Hdr, ttl);
    let before = ip.get(at);
    ip.set(at, TTL);
    delta.replace16(before, ip.get(at));
    // Swapped addresses have the same sum.
    let (src, dst) = (offset_of!(Ipv4Hdr, src_addr), offset_of!(Ipv4Hdr, dst_addr));
    let (from, to): (u32, u32) = (ip.get(src), ip.get(dst));
    ip.set(src, to);
    ip.set(dst, from);
    let checksum = ip.get(offset_of!(Ipv4Hdr, check));
    ip.set(offset_of!(Ipv4Hdr, check), delta.apply(checksum));
}

/// As [`reverse_v4`].
#[inline(always)]
pub(crate) fn reverse_v6(ip: &mut Header<'_, { Ipv6Hdr::LEN }>) {
    ip.set(offset_of!(Ipv6Hdr, hop_limit), TTL);
    let (src, dst) = (offset_of!(Ipv6Hdr, src_addr), offset_of!(Ipv6Hdr, dst_addr));
    for word in [0, 4, 8, 12] {
        let (from, to): (u32, u32) = (ip.get(src + word), ip.get(dst + word));
        ip.set(src + word, to);
        ip.set(dst + word, from);
    }
}

/// Writes the MAC addresses.
#[inline(always)]
pub(crate) fn address(frame: &mut Frame<'_>, hop: NextHop) -> Result<(), Verdict> {
    let mut eth = frame.header_mut::<12>(0).ok_or(Verdict::Truncated)?;
    let [a, b, c] = hop.mac_words();
    eth.set(0, a);
    eth.set(4, b);
    eth.set(8, c);
    Ok(())
}

/// One hop less to go, noted in the header's `delta`.
#[inline(always)]
pub(crate) fn decrement_ttl_v4(
    ip: &mut Header<'_, { Ipv4Hdr::LEN }>,
    delta: &mut Delta,
) -> Result<(), Verdict> {
    let ttl = ip.get::<u8>(offset_of!(Ipv4Hdr, ttl));
    if ttl <= 1 {
        return Err(Verdict::TtlExpired);
    }
    // The TTL is the first of two bytes. Reading them back would have to wait for the cache.
    let old: u16 = ip.get(offset_of!(Ipv4Hdr, ttl));
    let new = old.wrapping_sub(0x100_u16.to_be());
    ip.set(offset_of!(Ipv4Hdr, ttl), new);
    delta.replace16(old, new);
    Ok(())
}

#[inline(always)]
pub(crate) fn decrement_ttl_v6(ip: &mut Header<'_, { Ipv6Hdr::LEN }>) -> Result<(), Verdict> {
    let hop_limit = ip.get::<u8>(offset_of!(Ipv6Hdr, hop_limit));
    if hop_limit <= 1 {
        return Err(Verdict::TtlExpired);
    }
    ip.set(offset_of!(Ipv6Hdr, hop_limit), hop_limit - 1);
    Ok(())
}

/// Whether the TTL or hop limit lets a packet go no further than here.
#[must_use]
#[inline(always)]
pub fn expires(frame: &Frame<'_>, packet: &Packet) -> bool {
    let at = if packet.is_v4() { offset_of!(Ipv4Hdr, ttl) } else { offset_of!(Ipv6Hdr, hop_limit) };
    frame.header::<1>(L3 + at).is_none_or(|ttl| ttl.get::<u8>(0) <= 1)
}

#[inline(always)]
fn network_v4(
    frame: &mut Frame<'_>,
    to: &NatRewrite,
    is_sent: bool,
    transport: &mut Delta,
) -> Result<(), Verdict> {
    let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
    let mut header = Delta::default();
    if is_sent {
        decrement_ttl_v4(&mut ip, &mut header)?;
    }
    let at =
        if to.is_reply() { offset_of!(Ipv4Hdr, src_addr) } else { offset_of!(Ipv4Hdr, dst_addr) };
    let [_, _, _, new] = to.addr.words();
    let old: u32 = ip.get(at);
    ip.set(at, new);
    header.replace32(old, new);
    transport.replace32(old, new);
    let checksum = ip.get(offset_of!(Ipv4Hdr, check));
    ip.set(offset_of!(Ipv4Hdr, check), header.apply(checksum));
    Ok(())
}

#[inline(always)]
fn network_v6(
    frame: &mut Frame<'_>,
    to: &NatRewrite,
    is_sent: bool,
    transport: &mut Delta,
) -> Result<(), Verdict> {
    let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
    if is_sent {
        decrement_ttl_v6(&mut ip)?;
    }
    let at =
        if to.is_reply() { offset_of!(Ipv6Hdr, src_addr) } else { offset_of!(Ipv6Hdr, dst_addr) };
    replace_v6(&mut ip, at, to.addr, transport);
    Ok(())
}

/// Writes an address, noted in `delta`.
#[inline(always)]
pub(crate) fn replace_v6(
    ip: &mut Header<'_, { Ipv6Hdr::LEN }>,
    at: usize,
    addr: Address,
    delta: &mut Delta,
) {
    let [a, b, c, d] = addr.words();
    for (at, new) in [(at, a), (at + 4, b), (at + 8, c), (at + 12, d)] {
        delta.replace32(ip.get(at), new);
        ip.set(at, new);
    }
}

#[inline(always)]
fn ports(
    frame: &mut Frame<'_>,
    packet: &Packet,
    to: &NatRewrite,
    delta: Delta,
) -> Result<(), Verdict> {
    write_ports(frame, packet, abi::port_word(to.sport, to.dport), delta)
}

#[inline(always)]
fn write_ports(
    frame: &mut Frame<'_>,
    packet: &Packet,
    new: u32,
    mut delta: Delta,
) -> Result<(), Verdict> {
    let l4 = packet.l4 as usize;
    let mut ports = frame.header_mut::<4>(l4).ok_or(Verdict::Truncated)?;
    delta.replace32(ports.get(0), new);
    ports.set(0, new);
    if packet.key.proto == TCP {
        let at = offset_of!(TcpHdr, check);
        let mut tcp = frame.header_mut::<{ TcpHdr::LEN }>(l4).ok_or(Verdict::Truncated)?;
        let checksum = tcp.get(at);
        tcp.set(at, delta.apply(checksum));
    } else {
        let at = offset_of!(UdpHdr, check);
        let mut udp = frame.header_mut::<{ UdpHdr::LEN }>(l4).ok_or(Verdict::Truncated)?;
        let checksum: u16 = udp.get(at);
        udp.set(at, delta.apply_udp(checksum));
    }
    Ok(())
}

/// Writes an IPv4 header without options, checksum included; the words are as they stand there, with 0 for it.
#[inline(always)]
pub(crate) fn write_v4(frame: &mut Frame<'_>, words: [u32; 5]) -> Option<()> {
    write_v4_at(frame, L3, words)
}

/// The same at another offset.
#[inline(always)]
pub(crate) fn write_v4_at(frame: &mut Frame<'_>, l3: usize, words: [u32; 5]) -> Option<()> {
    let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(l3)?;
    let mut sum = 0;
    for (at, word) in [0, 4, 8, 12, 16].into_iter().zip(words) {
        ip.set(at, word);
        sum += u64::from(word);
    }
    ip.set(offset_of!(Ipv4Hdr, check), !checksum::fold(sum));
    Some(())
}

#[cfg(test)]
mod tests;
