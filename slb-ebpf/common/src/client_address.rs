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
    abi::{self, FlowKey},
    checksum::Delta,
    frame::Frame,
    parse::L3,
};

/// What is put into a packet, as it stands there: as much of it as [`len`] says.
pub type Words = [u32; HEADER_V6 as usize / 4];

/// What stands before it in the frame: up to [`MAX_BEYOND`] bytes behind the Ethernet header.
pub type Head = [[u64; 17]; 2];

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
/// Version 2, on behalf of somebody else, TCP over IPv4, the length of what follows.
const PROXY_V4: u32 = 0x2111 << 16 | 12;
const PROXY_V6: u32 = 0x2121 << 16 | 36;
/// Kind of the TCP option.
const OPTION: u32 = 254;

/// Where the sequence number stands in a TCP header.
pub const SEQUENCE: usize = offset_of!(TcpHdr, seq);
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
    for (number, word) in words.iter().enumerate() {
        if 4 * number as u32 >= len {
            break;
        }
        delta.add32(*word);
    }
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

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        abi::{Address, TCP},
        parse::fixtures::{Sample, samples},
    };

    /// What the program does with a frame: `sample` with the words at `at`.
    fn told(sample: &Sample, is_header: bool, client: &FlowKey, at: usize) -> Vec<u8> {
        let mut bytes = sample.bytes();
        let mut words = Words::default();
        let len = len(is_header, client.src.is_v4());
        write(&mut words, is_header, client);
        let l4 = sample.expected().l4 as usize;
        let mut frame = Frame::from_slice(&mut bytes);
        account(&mut frame, sample.dst.is_ipv4(), l4, &words, len, !is_header).unwrap();
        let inserted = words.into_iter().flat_map(u32::to_ne_bytes).take(len as usize);
        bytes.splice(at..at, inserted);
        bytes
    }

    fn octets(addr: Address) -> Vec<u8> {
        let at = if addr.is_v4() { 12 } else { 0 };
        addr.bytes[at..].to_vec()
    }

    proptest! {
        #[test]
        fn given_any_segment_when_a_client_is_told_of_then_it_is_what_a_proxy_would_send(
            sample in samples(),
            client in samples(),
        ) {
            let sample = Sample { proto: TCP, ..sample };
            let key = client.expected().key;
            let is_v4 = key.src.is_v4();

            let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
            header.extend(if is_v4 { [0x11, 0, 12] } else { [0x21, 0, 36] });
            header.extend([octets(key.src), octets(key.dst)].concat());
            header.extend([key.sport.to_be_bytes(), key.dport.to_be_bytes()].concat());
            let l4 = sample.expected().l4 as usize;
            let data = l4 + 20 + sample.tcp_options.len();
            let payload = [header, sample.payload.clone()].concat();
            let expected = Sample { payload, ..sample.clone() }.bytes();
            prop_assert_eq!(told(&sample, true, &key, data), expected);

            let mut option = std::vec![254, if is_v4 { 8 } else { 20 }];
            option.extend(key.sport.to_be_bytes());
            option.extend(octets(key.src));
            option.extend(&sample.tcp_options);
            prop_assume!(option.len() <= 40);
            let expected = Sample { tcp_options: option, ..sample.clone() }.bytes();
            prop_assert_eq!(told(&sample, false, &key, l4 + 20), expected);
        }

        #[test]
        fn given_a_number_when_it_is_changed_then_the_checksum_stays_right(
            sample in samples(),
            by in any::<u32>(),
            is_sequence in any::<bool>(),
        ) {
            let sample = Sample { proto: TCP, ..sample };
            let l4 = sample.expected().l4 as usize;
            let at = if is_sequence { SEQUENCE } else { ACKNOWLEDGEMENT };
            let before = sample.bytes();
            let mut bytes = before.clone();
            renumber(&mut Frame::from_slice(&mut bytes), l4, at, by).unwrap();
            let number = |bytes: &[u8]| {
                u32::from_be_bytes(bytes[l4 + at..l4 + at + 4].try_into().unwrap())
            };
            prop_assert_eq!(number(&bytes), number(&before).wrapping_add(by));
            renumber(&mut Frame::from_slice(&mut bytes), l4, at, by.wrapping_neg()).unwrap();
            prop_assert_eq!(bytes, before);
        }
    }
}
