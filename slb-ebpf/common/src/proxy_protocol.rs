//! Tells a backend that sees a source of ours who the client is: by a PROXY protocol header, version 2, before
//! what the client sends (HAProxy's `doc/proxy-protocol.txt`), or by a TCP option of kind 254 (RFC 4727), as
//! the TOA modules of LVS and DPVS read it.
//!
//! A header takes sequence numbers that the client knows nothing of. It stands before the client's first byte,
//! so that only the numbers of what begins the connection move: its SYN comes that much earlier, and what has
//! not acknowledged the header acknowledges nothing of the client's.

use core::{mem::offset_of, ptr};

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    abi::{self, FlowKey},
    checksum::Delta,
    frame::Frame,
    parse::L3,
    words,
};

/// What is put into a packet, as it stands there: as much of it as [`len`] says.
pub type Words = [u32; HEADER_V6 as usize / 4];

/// What stands before it in the frame: up to [`MAX_BEYOND`] bytes behind the Ethernet header.
pub type Head = [[u64; 17]; 2];

/// The options of a TCP segment: in the first half as they are found, in the second as they are made.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Options {
    /// Those of the client.
    pub found: [u8; OPTIONS_SIZE],
    /// Those that the backend gets.
    pub made: [u8; OPTIONS_SIZE],
    /// How many bytes of them there are, what is left of the one that is being looked at, and what becomes of it.
    ///
    /// Here because the verifier follows a value in a register or on the stack through every way that leads to
    /// it, but forgets what is in a map.
    pub end: u32,
    /// See above.
    pub left: u32,
    /// See above.
    pub how: u32,
    /// Zero.
    pub spare: u32,
}

/// More than there can be, and a power of two.
pub const OPTIONS_SIZE: usize = 64;
/// As many bytes of options as a TCP header has room for.
const MAX_OPTIONS: u32 = 40;

impl Options {
    /// Forgets those of another segment.
    #[inline(always)]
    pub fn clear(&mut self) {
        for number in 0..OPTIONS_SIZE / 4 {
            // In words, as the compiler would call `memset` otherwise.
            // SAFETY: inside of `found`, which is aligned to 8 bytes.
            unsafe { ptr::from_mut(&mut self.found).cast::<u32>().add(number).write_volatile(0) };
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        let (found, made) = ([0; OPTIONS_SIZE], [0; OPTIONS_SIZE]);
        Self { found, made, end: 0, left: 0, how: 0, spare: 0 }
    }
}

/// All headers of IPv4, and of IPv6 with 155 bytes of extension headers at least. One less than a power of two.
pub const MAX_BEYOND: u32 = 0xff;
const _: () = assert!(L3 + MAX_BEYOND as usize <= size_of::<Head>());

/// Length of a PROXY protocol header for a client over IPv4.
const HEADER_V4: u32 = 28;
const HEADER_V6: u32 = 52;
/// Length of the TCP option for a client over IPv4.
const OPTION_V4: u32 = 8;
const OPTION_V6: u32 = 20;

/// What a PROXY protocol header begins with.
const SIGNATURE: [u32; 3] = [0x0d0a_0d0a, 0x000d_0a51, 0x5549_540a];
/// Version 2, on behalf of another host, TCP over IPv4, the length of what follows.
const PROXY_V4: u32 = (0x2111 << 16) + 12;
const PROXY_V6: u32 = (0x2121 << 16) + 36;
/// Kind of the TCP option.
const OPTION: u32 = 254;
/// Kind of the option of TCP Fast Open (RFC 7413); its experimental form shares [`OPTION`] (RFC 6994).
const FAST_OPEN: u8 = 34;
/// Kinds of options of one byte (RFC 9293, section 3.2).
const END: u8 = 0;
const NO_OPERATION: u8 = 1;

/// Where the sequence number stands in a TCP header.
pub const SEQUENCE: usize = offset_of!(TcpHdr, seq);
/// Where the length of a TCP header stands, and its flags: 16 bits.
const FLAGS: usize = 12;
/// Where the number stands that the receiver is waited for at.
pub const ACKNOWLEDGEMENT: usize = offset_of!(TcpHdr, ack_seq);

/// How many bytes a backend is told about a client, a multiple of 4. `is_v4`: the client's family.
#[must_use]
#[inline(always)]
pub const fn len(is_header: bool, is_v4: bool) -> u32 {
    match (is_header, is_v4) {
        (true, true) => HEADER_V4,
        (true, false) => HEADER_V6,
        (false, true) => OPTION_V4,
        (false, false) => OPTION_V6,
    }
}

/// By how much a segment that answers one SYN cookie may differ from one that answers another: a cookie has, beyond the
/// number of the SYN, one of four maximum segment sizes in its lowest bits (Linux, `net/ipv4/syncookies.c`).
pub const COOKIE_SPREAD: u32 = 3;

/// Whether a backend without the connection may take a segment with these `numbers`, its own and the one that it
/// acknowledges, for the answer to a SYN cookie. `distance` is that between both in the answer to a SYN-ACK.
///
/// A cookie is a distance: a client that has one cookie has those for all numbers.
#[must_use]
#[inline(always)]
pub const fn is_cookie((sequence, acknowledgement): (u32, u32), distance: u32) -> bool {
    let ahead = acknowledgement.wrapping_sub(sequence).wrapping_sub(distance);
    ahead.wrapping_add(COOKIE_SPREAD) <= 2 * COOKIE_SPREAD
}

/// Writes what a backend is told about the client whose packets have `key`.
#[inline(always)]
pub fn write(words: &mut Words, is_header: bool, key: &FlowKey) {
    let is_v4 = key.src.is_v4();
    let ([a, b, c, d], [e, f, g, h]) = (key.src.words(), key.dst.words());
    let ports = abi::port_word(key.sport, key.dport);
    let [x, y, z] = SIGNATURE.map(u32::to_be);
    let kind = (OPTION << 24 | len(false, is_v4) << 16 | u32::from(key.sport)).to_be();
    if !is_header {
        words[0] = kind;
        if is_v4 {
            words[1] = d;
        } else {
            (words[1], words[2], words[3], words[4]) = (a, b, c, d);
        }
        return;
    }
    (words[0], words[1], words[2]) = (x, y, z);
    if is_v4 {
        (words[3], words[4], words[5], words[6]) = (PROXY_V4.to_be(), d, h, ports);
    } else {
        (words[3], words[12]) = (PROXY_V6.to_be(), ports);
        (words[4], words[5], words[6], words[7]) = (a, b, c, d);
        (words[8], words[9], words[10], words[11]) = (e, f, g, h);
    }
}

/// Makes `options.made` of the first `len` bytes of `options.found`: without any that only the gateway may
/// send to a backend, or that would let one client stand in for another, and behind the first `more` bytes of
/// `words`, which are an option. Gives its length.
///
/// Where not all have room, the last of them are left out.
#[inline(always)]
pub fn make_options(options: &mut Options, len: u32, words: &Words, more: u32) -> u32 {
    const SKIP: u32 = 0;
    const KEEP: u32 = 1;
    const BLANK: u32 = 2;
    let Options { found, made, end: made_len, left: state_left, how: state_how, .. } = options;
    for number in 0..OPTIONS_SIZE / 4 {
        let word = words.get(number).filter(|_| 4 * (number as u32) < more);
        // In words, as the compiler would call `memset` or `memcpy` otherwise.
        // SAFETY: inside of `made`, which is aligned to 8 bytes.
        unsafe {
            ptr::from_mut(made).cast::<u32>().add(number).write_volatile(word.map_or(0, |w| *w));
        }
    }
    let fits = len + more <= MAX_OPTIONS;
    words::store(made_len, more);
    words::store(state_left, 0);
    for at in 0..MAX_OPTIONS {
        if at >= len {
            break;
        }
        let byte = found[at as usize % OPTIONS_SIZE];
        let mut left = words::load(state_left);
        if left == 0 {
            if byte == END {
                break;
            }
            left = 1;
            let mut how = if fits { KEEP } else { SKIP };
            if byte != NO_OPERATION {
                left = u32::from(found[(at + 1) as usize % OPTIONS_SIZE]);
                // The length is wrong, so what follows cannot be read: it is left out.
                if left < 2 || at + left > len {
                    break;
                }
                let is_foreign = byte == OPTION as u8 || byte == FAST_OPEN;
                let has_room = words::load(made_len).wrapping_add(left) <= MAX_OPTIONS;
                how = match (is_foreign, fits) {
                    (true, true) => BLANK,
                    (false, _) if has_room => KEEP,
                    _ => SKIP,
                };
            }
            words::store(state_how, how);
        }
        words::store(state_left, left.wrapping_sub(1));
        let how = words::load(state_how);
        if how != SKIP {
            let end = words::load(made_len);
            made[end as usize % OPTIONS_SIZE] = if how == KEEP { byte } else { NO_OPERATION };
            words::store(made_len, end.wrapping_add(1));
        }
    }
    let end = words::load(made_len);
    if fits { more + len } else { end.wrapping_add(3) & !3 }
}

/// How much the sum of a segment changes with its options. Behind both are zeros.
#[must_use]
#[inline(always)]
pub fn options_delta(options: &Options) -> Delta {
    let mut delta = Delta::default();
    for at in (0..MAX_OPTIONS as usize).step_by(4) {
        let word = |bytes: &[u8; OPTIONS_SIZE]| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        delta.replace32(word(&options.found), word(&options.made));
    }
    delta
}

/// How much the sum of a segment changes when `len` bytes of `words` are put into it.
#[must_use]
#[inline(always)]
pub fn words_delta(words: &Words, len: u32) -> Delta {
    let mut delta = Delta::default();
    for (number, word) in words.iter().enumerate() {
        if 4 * number as u32 >= len {
            break;
        }
        delta.add32(*word);
    }
    delta
}

/// Makes the headers of a TCP packet right for a part of it that becomes `after` bytes long, and was `before`; its
/// sum changes by `delta`. `is_option`: that part are its options.
#[must_use]
#[inline(always)]
pub fn account(
    frame: &mut Frame<'_>,
    is_v4: bool,
    l4: usize,
    (before, after): (u32, u32),
    mut delta: Delta,
    is_option: bool,
) -> Option<()> {
    let (old, new) = (before as u16, after as u16);
    let more = new.wrapping_sub(old);
    if is_v4 {
        let mut ip = frame.header_mut::<{ Ipv4Hdr::LEN }>(L3)?;
        let at = offset_of!(Ipv4Hdr, tot_len);
        let before = ip.get_be16(at);
        let after = before.wrapping_add(more);
        ip.set(at, after.to_be());
        let mut delta = Delta::default();
        delta.replace16(before.to_be(), after.to_be());
        let checksum = ip.get(offset_of!(Ipv4Hdr, check));
        ip.set(offset_of!(Ipv4Hdr, check), delta.apply(checksum));
    } else {
        let mut ip = frame.header_mut::<{ Ipv6Hdr::LEN }>(L3)?;
        let at = offset_of!(Ipv6Hdr, payload_len);
        let after = ip.get_be16(at).wrapping_add(more);
        ip.set(at, after.to_be());
    }
    // The length in the pseudo-header.
    delta.replace16(old.to_be(), new.to_be());
    let mut tcp = frame.header_mut::<{ TcpHdr::LEN }>(l4)?;
    if is_option {
        let before: u16 = tcp.get(FLAGS);
        let after = u16::from_be(before) & 0x0fff | (5 + new / 4) << 12;
        tcp.set(FLAGS, after.to_be());
        delta.replace16(before, after.to_be());
    }
    let checksum = tcp.get(offset_of!(TcpHdr, check));
    tcp.set(offset_of!(TcpHdr, check), delta.apply(checksum));
    Some(())
}

/// Takes the urgent pointer off a TCP header: what it points to is no byte of the stream any more.
#[must_use]
#[inline(always)]
pub fn clear_urgent(frame: &mut Frame<'_>, l4: usize) -> Option<()> {
    const URG: u16 = 0x20;
    let mut tcp = frame.header_mut::<{ TcpHdr::LEN }>(l4)?;
    let mut delta = Delta::default();
    let before: u16 = tcp.get(FLAGS);
    let after = before & !URG.to_be();
    tcp.set(FLAGS, after);
    delta.replace16(before, after);
    let pointer: u16 = tcp.get(offset_of!(TcpHdr, urg_ptr));
    tcp.set(offset_of!(TcpHdr, urg_ptr), 0_u16);
    delta.replace16(pointer, 0);
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

#[cfg(test)]
mod tests;
