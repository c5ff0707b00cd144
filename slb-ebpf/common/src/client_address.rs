//! Tells a backend that sees a source of ours who the client is: by a PROXY protocol header, version 2, before
//! what the client sends (HAProxy's `doc/proxy-protocol.txt`), or by a TCP option of kind 254 (RFC 4727), as
//! the TOA modules of LVS and DPVS read it.
//!
//! A header takes sequence numbers that the client knows nothing of. It stands before the client's first byte,
//! so that only the numbers of what begins the connection move: its SYN comes that much earlier, and what has
//! not acknowledged the header acknowledges nothing of the client's.

use core::mem::offset_of;

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{
    abi::{BACKEND_PROXY, FlowKey},
    checksum::Delta,
    frame::Frame,
    parse::L3,
};

/// What is put into a packet, as it stands there: of as many words as [`len`] says, 0 behind them.
pub type Words = [u32; MAX_LEN / 4];

/// Length of the longest.
pub const MAX_LEN: usize = HEADER_V6 as usize;

/// Length of a PROXY protocol header for a client over IPv4.
const HEADER_V4: u32 = 28;
const HEADER_V6: u32 = 52;
/// Length of the TCP option for a client over IPv4.
const OPTION_V4: u32 = 8;
const OPTION_V6: u32 = 20;

/// What a PROXY protocol header begins with.
const SIGNATURE: [u32; 3] = [0x0d0a_0d0a, 0x000d_0a51, 0x5549_540a];
/// Version 2, on behalf of somebody else, TCP over IPv4, the length of what follows.
const PROXY_V4: u32 = 0x2111 << 16 | 12;
const PROXY_V6: u32 = 0x2121 << 16 | 36;
/// Kind of the TCP option.
const OPTION: u32 = 254;

/// Where the sequence number stands in a TCP header.
pub const SEQUENCE: usize = offset_of!(TcpHdr, seq);
/// Where the number stands that the receiver is waited for at.
pub const ACKNOWLEDGEMENT: usize = offset_of!(TcpHdr, ack_seq);

/// How many bytes a backend with these flags is told about a client, a multiple of 4. `is_v4`: the client's
/// family.
#[must_use]
#[inline(always)]
pub const fn len(flags: u32, is_v4: bool) -> u32 {
    match (flags & BACKEND_PROXY != 0, is_v4) {
        (true, true) => HEADER_V4,
        (true, false) => HEADER_V6,
        (false, true) => OPTION_V4,
        (false, false) => OPTION_V6,
    }
}

/// Writes what a backend with these flags is told about the client whose packets have `key`.
#[inline(always)]
pub fn write(words: &mut Words, flags: u32, key: &FlowKey) {
    let is_v4 = key.src.is_v4();
    let [_, _, _, src_v4] = key.src.words();
    let [_, _, _, dst_v4] = key.dst.words();
    let [a, b, c, d] = key.src.words();
    let [e, f, g, h] = key.dst.words();
    let ports = (u32::from(key.sport) << 16 | u32::from(key.dport)).to_be();
    if flags & BACKEND_PROXY == 0 {
        let kind = (OPTION << 24 | len(flags, is_v4) << 16 | u32::from(key.sport)).to_be();
        *words = if is_v4 {
            [kind, src_v4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        } else {
            [kind, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0]
        };
        return;
    }
    let [x, y, z] = SIGNATURE.map(u32::to_be);
    *words = if is_v4 {
        [x, y, z, PROXY_V4.to_be(), src_v4, dst_v4, ports, 0, 0, 0, 0, 0, 0]
    } else {
        [x, y, z, PROXY_V6.to_be(), a, b, c, d, e, f, g, h, ports]
    };
}

/// Makes the headers of a TCP packet right for `len` bytes more, which `words` are. `is_option`: they are
/// options.
#[must_use]
#[inline(always)]
pub fn account(
    frame: &mut Frame<'_>,
    is_v4: bool,
    l4: usize,
    words: &Words,
    len: u32,
    is_option: bool,
) -> Option<()> {
    let more = len as u16;
    if is_v4 {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3)?;
        let at = offset_of!(Ipv4Hdr, tot_len);
        let before = ip.number(at);
        let after = before.wrapping_add(more);
        ip.set(at, after.to_be());
        let mut delta = Delta::default();
        delta.replace16(before.to_be(), after.to_be());
        let checksum = ip.get(offset_of!(Ipv4Hdr, check));
        ip.set(offset_of!(Ipv4Hdr, check), delta.apply(checksum));
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3)?;
        let at = offset_of!(Ipv6Hdr, payload_len);
        let after = ip.number(at).wrapping_add(more);
        ip.set(at, after.to_be());
    }
    // Of the text: the length in the pseudo-header, and the words themselves.
    let mut delta = Delta::default();
    delta.replace16(0, more.to_be());
    let [a, b, c, d, e, f, g, h, i, j, k, l, m] = *words;
    delta.add32(a);
    delta.add32(b);
    delta.add32(c);
    delta.add32(d);
    delta.add32(e);
    delta.add32(f);
    delta.add32(g);
    delta.add32(h);
    delta.add32(i);
    delta.add32(j);
    delta.add32(k);
    delta.add32(l);
    delta.add32(m);
    let mut tcp = frame.header_mut::<{ TcpHdr::LEN }>(l4)?;
    if is_option {
        const LENGTH: usize = 12;
        let before: u16 = tcp.get(LENGTH);
        let after = u16::from_be(before).wrapping_add((more / 4) << 12).to_be();
        tcp.set(LENGTH, after);
        delta.replace16(before, after);
    }
    let checksum = tcp.get(offset_of!(TcpHdr, check));
    tcp.set(offset_of!(TcpHdr, check), delta.apply(checksum));
    Some(())
}

/// Adds to the [`SEQUENCE`] or [`ACKNOWLEDGEMENT`] number of a TCP header.
#[must_use]
#[inline(always)]
pub fn renumber(frame: &mut Frame<'_>, l4: usize, at: usize, by: u32) -> Option<()> {
    let mut tcp = frame.header_mut::<{ TcpHdr::LEN }>(l4)?;
    let before: u32 = tcp.get(at);
    let after = u32::from_be(before).wrapping_add(by).to_be();
    tcp.set(at, after);
    let mut delta = Delta::default();
    delta.replace32(before, after);
    let checksum = tcp.get(offset_of!(TcpHdr, check));
    tcp.set(offset_of!(TcpHdr, check), delta.apply(checksum));
    Some(())
}
