//! Puts packets into others, and finds them there: IP in IP (RFC 2003, 2473, 4213), and Generic UDP
//! Encapsulation (draft-ietf-intarea-gue-09, variant 0).
//!
//! Every family goes into every other. The flow's hash is in all fields of the outer headers by which
//! receivers and routers spread packets, so that one flow takes one way and two flows may take two.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use crate::{
    abi::{Address, NextHop, UDP},
    checksum::{self, Delta},
    frame::Frame,
    parse::{DONT_FRAGMENT, ETHERTYPE_IPV4, ETHERTYPE_IPV6, L3},
    rewrite::{self, TTL},
    verdict::Verdict,
};

/// Protocol numbers of an IP packet in another.
const IPV4: u8 = 4;
const IPV6: u8 = 41;
/// Version, flags and protocol; neither control bit nor optional fields.
const GUE_LEN: usize = 4;
/// IANA's port of GUE.
pub const GUE_PORT: u16 = 6_080;
/// Congestion experienced: both bits of the ECN field (RFC 3168).
const CE: u8 = 3;

/// A tunnel, and a flow's way through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Where it ends; says the outer family.
    pub dst: Address,
    /// Where it begins: of the same family, a prefix of 16 bits of IPv4 or 64 of IPv6, whose rest the
    /// hash fills.
    pub src: Address,
    /// The neighbour on the way there; it has to be known.
    pub hop: NextHop,
    /// [`crate::hash::flow`] of the packet.
    pub hash: u64,
    /// Destination port of GUE; 0: IP in IP.
    pub port: u16,
}

impl Tunnel {
    /// By how many bytes packets become longer.
    #[must_use]
    #[inline(always)]
    pub const fn overhead(&self) -> usize {
        overhead(self.dst.is_v4(), self.port != 0)
    }
}

/// What IP in IP or GUE cost over this outer family, in bytes.
#[must_use]
#[inline(always)]
pub const fn overhead(is_outer_v4: bool, is_gue: bool) -> usize {
    let ip = if is_outer_v4 { Ipv4Hdr::LEN } else { Ipv6Hdr::LEN };
    if is_gue { ip + UdpHdr::LEN + GUE_LEN } else { ip }
}

/// What the outer header takes from the inner one.
struct Inner {
    /// Of the whole packet.
    len: u16,
    /// DSCP and ECN.
    tos: u8,
    /// Identification and DF.
    fragmentation: u32,
    proto: u8,
}

/// Fills the first [`Tunnel::overhead`] bytes of a frame that was grown by as many at its head, and
/// counts the tunnel's entry as a hop of the inner packet.
///
/// # Errors
///
/// [`Verdict::TtlExpired`], with the frame unchanged: [`rewrite::expires`] tells before it is grown.
/// [`Verdict::Truncated`]: the frame was not grown.
#[inline(always)]
pub fn write(frame: &mut Frame<'_>, is_v4: bool, tunnel: &Tunnel) -> Result<(), Verdict> {
    // Constants to the compiler, and so to the verifier.
    match (tunnel.dst.is_v4(), tunnel.port != 0) {
        (true, false) => over_v4(frame, is_v4, tunnel, false),
        (true, true) => over_v4(frame, is_v4, tunnel, true),
        (false, false) => over_v6(frame, is_v4, tunnel, false),
        (false, true) => over_v6(frame, is_v4, tunnel, true),
    }
}

#[inline(always)]
fn over_v4(
    frame: &mut Frame<'_>,
    is_v4: bool,
    tunnel: &Tunnel,
    is_gue: bool,
) -> Result<(), Verdict> {
    let overhead = overhead(true, is_gue);
    let inner = shorten(frame, is_v4, L3 + overhead)?;
    let len = inner.len.wrapping_add(overhead as u16);
    let proto = if is_gue { UDP as u8 } else { inner.proto };
    let [_, _, _, src] = tunnel.src.words();
    let [_, _, _, dst] = tunnel.dst.words();
    let words = [
        (0x45 << 24 | u32::from(inner.tos) << 16 | u32::from(len)).to_be(),
        inner.fragmentation.to_be(),
        (u32::from(TTL) << 24 | u32::from(proto) << 16).to_be(),
        src | u32::from((tunnel.hash >> 16) as u16).to_be(),
        dst,
    ];
    rewrite::write_v4(frame, words).ok_or(Verdict::Truncated)?;
    if is_gue {
        gue(frame, L3 + Ipv4Hdr::LEN, &inner, tunnel)?;
    }
    ethernet(frame, ETHERTYPE_IPV4, tunnel.hop)
}

#[inline(always)]
fn over_v6(
    frame: &mut Frame<'_>,
    is_v4: bool,
    tunnel: &Tunnel,
    is_gue: bool,
) -> Result<(), Verdict> {
    let overhead = overhead(false, is_gue);
    let inner = shorten(frame, is_v4, L3 + overhead)?;
    let len = inner.len.wrapping_add((overhead - Ipv6Hdr::LEN) as u16);
    let flow_label = tunnel.hash as u32 & 0x000f_ffff;
    let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3).ok_or(Verdict::Truncated)?;
    ip.set(0, (6 << 28 | u32::from(inner.tos) << 20 | flow_label).to_be());
    ip.set(offset_of!(Ipv6Hdr, payload_len), len.to_be());
    ip.set(offset_of!(Ipv6Hdr, next_hdr), if is_gue { UDP as u8 } else { inner.proto });
    ip.set(offset_of!(Ipv6Hdr, hop_limit), TTL);
    let [prefix, rest] = tunnel.src.halves();
    let src = offset_of!(Ipv6Hdr, src_addr);
    ip.set(src, prefix);
    ip.set(src + 8, rest | tunnel.hash.to_be());
    let [high, low] = tunnel.dst.halves();
    let dst = offset_of!(Ipv6Hdr, dst_addr);
    ip.set(dst, high);
    ip.set(dst + 8, low);
    if is_gue {
        gue(frame, L3 + Ipv6Hdr::LEN, &inner, tunnel)?;
    }
    ethernet(frame, ETHERTYPE_IPV6, tunnel.hop)
}

/// One hop less to go for the inner packet, which is at `l3`.
#[inline(always)]
fn shorten(frame: &mut Frame<'_>, is_v4: bool, l3: usize) -> Result<Inner, Verdict> {
    if is_v4 {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(l3).ok_or(Verdict::Truncated)?;
        let mut header = Delta::default();
        rewrite::decrement_ttl_v4(&mut ip, &mut header)?;
        let checksum = ip.get(offset_of!(Ipv4Hdr, check));
        ip.set(offset_of!(Ipv4Hdr, check), header.apply(checksum));
        Ok(Inner {
            len: ip.get_be16(offset_of!(Ipv4Hdr, tot_len)),
            tos: ip.get(offset_of!(Ipv4Hdr, tos)),
            // What may be fragmented is as unique as its sender has made it (RFC 6864).
            fragmentation: u32::from_be(ip.get(offset_of!(Ipv4Hdr, id)))
                & (0xffff_0000 | DONT_FRAGMENT),
            proto: IPV4,
        })
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(l3).ok_or(Verdict::Truncated)?;
        rewrite::decrement_ttl_v6(&mut ip)?;
        Ok(Inner {
            len: (Ipv6Hdr::LEN as u16).wrapping_add(ip.get_be16(offset_of!(Ipv6Hdr, payload_len))),
            tos: (ip.get_be16(0) >> 4) as u8,
            fragmentation: DONT_FRAGMENT,
            proto: IPV6,
        })
    }
}

/// UDP and GUE headers. The checksum is 0: over IPv4 that is anyone's choice, over IPv6 that of tunnels
/// whose inner packets have checksums of their own (RFC 6935, 6936).
#[inline(always)]
fn gue(frame: &mut Frame<'_>, at: usize, inner: &Inner, tunnel: &Tunnel) -> Result<(), Verdict> {
    // From the ports at which no service is registered.
    let sport = 0xc000 | tunnel.hash as u16;
    let len = inner.len.wrapping_add((UdpHdr::LEN + GUE_LEN) as u16);
    let mut udp = frame.header_mut::<{ UdpHdr::LEN + GUE_LEN }>(at).ok_or(Verdict::Truncated)?;
    udp.set(0, (u32::from(sport) << 16 | u32::from(tunnel.port)).to_be());
    udp.set(4, (u32::from(len) << 16).to_be());
    udp.set(8, (u32::from(inner.proto) << 16).to_be());
    Ok(())
}

#[inline(always)]
fn ethernet(frame: &mut Frame<'_>, ethertype: u16, hop: NextHop) -> Result<(), Verdict> {
    let mut eth = frame.header_mut::<{ EthHdr::LEN }>(0).ok_or(Verdict::Truncated)?;
    eth.set(offset_of!(EthHdr, ether_type), ethertype.to_be());
    rewrite::address(frame, hop)
}

/// A packet in a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decap {
    /// By how many bytes the frame is longer than the packet's own would be.
    pub strip: usize,
    /// Whether the packet is IPv4, and not IPv6.
    pub is_v4: bool,
    /// Whether the tunnel was congested.
    is_marked: bool,
}

/// The packet in a frame, if it came through a tunnel as [`write()`] makes them, with GUE at `port`.
///
/// Left to the kernel are options, fragments, and datagrams whose checksum would have to be verified.
#[must_use]
#[inline(always)]
pub fn inner(frame: &Frame<'_>, port: u16) -> Option<Decap> {
    let eth = frame.header::<{ EthHdr::LEN }>(0)?;
    let (proto, len, tos) = match eth.get_be16(offset_of!(EthHdr, ether_type)) {
        ETHERTYPE_IPV4 => {
            let ip = frame.header::<{ Ipv4Hdr::LEN }>(L3)?;
            let sum = u64::from(ip.get::<u32>(0))
                + u64::from(ip.get::<u32>(4))
                + u64::from(ip.get::<u32>(8))
                + u64::from(ip.get::<u32>(12))
                + u64::from(ip.get::<u32>(16));
            let more_or_later_fragments = 0x3fff;
            if ip.get::<u8>(0) != 0x45
                || ip.get_be16(offset_of!(Ipv4Hdr, frags)) & more_or_later_fragments != 0
                || !checksum::is_valid(sum)
            {
                return None;
            }
            (ip.get::<u8>(offset_of!(Ipv4Hdr, proto)), Ipv4Hdr::LEN, ip.get(1))
        }
        ETHERTYPE_IPV6 => {
            let ip = frame.header::<{ Ipv6Hdr::LEN }>(L3)?;
            if ip.get::<u8>(0) >> 4 != 6 {
                return None;
            }
            let tos = (ip.get_be16(0) >> 4) as u8;
            (ip.get(offset_of!(Ipv6Hdr, next_hdr)), Ipv6Hdr::LEN, tos)
        }
        _ => return None,
    };
    let (proto, strip) = if u32::from(proto) == UDP {
        let udp = frame.header::<{ UdpHdr::LEN + GUE_LEN }>(L3 + len)?;
        let checksum: u16 = udp.get(offset_of!(UdpHdr, check));
        let gue = u32::from_be(udp.get(UdpHdr::LEN));
        let but_protocol = 0xff00_ffff;
        if udp.get_be16(2) != port || checksum != 0 || gue & but_protocol != 0 {
            return None;
        }
        ((gue >> 16) as u8, len + UdpHdr::LEN + GUE_LEN)
    } else {
        (proto, len)
    };
    let is_v4 = match (proto, frame.header::<1>(L3 + strip)?.get::<u8>(0) >> 4) {
        (IPV4, 4) => true,
        (IPV6, 6) => false,
        _ => return None,
    };
    Some(Decap { strip, is_v4, is_marked: tos & CE == CE })
}

/// Writes the packet's own Ethernet header, [`Decap::strip`] bytes behind that of the tunnel, and a
/// mark of the tunnel's congestion into the packet (RFC 6040, section 4.2).
///
/// `None`: the packet has to be dropped, as its sender does not understand such marks.
#[inline(always)]
pub fn unwrap(frame: &mut Frame<'_>, decap: &Decap) -> Option<()> {
    if decap.is_marked {
        mark(frame, decap)?;
    }
    let outer = frame.header::<12>(0)?;
    let macs: [u32; 3] = [outer.get(0), outer.get(4), outer.get(8)];
    let mut eth = frame.header_mut::<{ EthHdr::LEN }>(decap.strip)?;
    for (at, word) in [0, 4, 8].into_iter().zip(macs) {
        eth.set(at, word);
    }
    let ethertype = if decap.is_v4 { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
    eth.set(offset_of!(EthHdr, ether_type), ethertype.to_be());
    Some(())
}

#[inline(always)]
fn mark(frame: &mut Frame<'_>, decap: &Decap) -> Option<()> {
    let l3 = L3 + decap.strip;
    if decap.is_v4 {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(l3)?;
        let before: u16 = ip.get(0);
        let tos = ip.get::<u8>(1);
        if tos & CE == 0 {
            return None;
        }
        ip.set(1, tos | CE);
        let mut header = Delta::default();
        header.replace16(before, ip.get(0));
        let checksum = ip.get(offset_of!(Ipv4Hdr, check));
        ip.set(offset_of!(Ipv4Hdr, check), header.apply(checksum));
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(l3)?;
        let marks = u16::from(CE) << 4;
        let before = ip.get_be16(0);
        if before & marks == 0 {
            return None;
        }
        ip.set(0, (before | marks).to_be());
    }
    Some(())
}

#[cfg(test)]
mod tests;
