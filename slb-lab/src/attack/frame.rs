//! Frames of the attacks, written field by field: the fields of an attack are wrong, and there are many frames.

use std::net::{Ipv4Addr, SocketAddrV4};

/// TCP flag.
pub const FIN: u8 = 1;
/// TCP flag.
pub const SYN: u8 = 2;
/// TCP flag.
pub const RST: u8 = 4;
/// TCP flag.
pub const ACK: u8 = 16;

const ETHERNET: usize = 14;
const IP: usize = 20;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// More fragments follow (RFC 791).
const MORE_FRAGMENTS: u16 = 0x2000;

/// Destination and source of an Ethernet frame.
#[derive(Clone, Copy, Debug)]
pub struct Macs {
    /// To whom.
    pub to: [u8; 6],
    /// From whom.
    pub from: [u8; 6],
}

/// A frame under construction; the buffer is used again for the next one.
struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Begins an IPv4 packet with this Identification; a first fragment if more are to follow.
    fn begin(
        bytes: &'a mut Vec<u8>,
        macs: Macs,
        (from, to): (Ipv4Addr, Ipv4Addr),
        proto: u8,
        id: u16,
        more_fragments: bool,
    ) -> Self {
        bytes.clear();
        bytes.extend(macs.to);
        bytes.extend(macs.from);
        bytes.extend([0x08, 0x00, 0x45, 0, 0, 0]);
        bytes.extend(id.to_be_bytes());
        bytes.extend(if more_fragments { MORE_FRAGMENTS } else { 0 }.to_be_bytes());
        bytes.extend([64, proto, 0, 0]);
        bytes.extend(from.octets());
        bytes.extend(to.octets());
        Self { bytes }
    }

    /// Fills in the length and the checksum of the IPv4 header.
    fn finish(mut self) {
        let len = (self.bytes.len() - ETHERNET) as u16;
        self.put(ETHERNET + 2, len);
        let sum = checksum(&self.bytes[ETHERNET..ETHERNET + IP], 0);
        self.put(ETHERNET + 10, sum);
    }

    fn put(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    /// Fills in a checksum that counts the addresses as well (RFC 9293 section 3.1, RFC 768).
    fn seal(&mut self, proto: u8, at: usize) {
        let l4 = ETHERNET + IP;
        let len = (self.bytes.len() - l4) as u32;
        let addresses = sum(&self.bytes[ETHERNET + 12..l4]);
        let sum = checksum(&self.bytes[l4..], addresses + u32::from(proto) + len);
        self.put(l4 + at, sum);
    }
}

/// A TCP segment with these numbers and flags; a SYN has the option of a segment size.
pub fn tcp(
    bytes: &mut Vec<u8>,
    macs: Macs,
    (from, to): (SocketAddrV4, SocketAddrV4),
    (sequence, acknowledgement): (u32, u32),
    flags: u8,
    payload: &[u8],
) {
    let mut writer = Writer::begin(bytes, macs, (*from.ip(), *to.ip()), TCP, 0, false);
    let options: &[u8] = if flags & SYN == 0 { &[] } else { &[2, 4, 0x05, 0xb4] };
    segment(writer.bytes, (from, to), (sequence, acknowledgement), flags, options);
    writer.bytes.extend(payload);
    writer.seal(TCP, 16);
    writer.finish();
}

fn segment(
    bytes: &mut Vec<u8>,
    (from, to): (SocketAddrV4, SocketAddrV4),
    (sequence, acknowledgement): (u32, u32),
    flags: u8,
    options: &[u8],
) {
    bytes.extend(from.port().to_be_bytes());
    bytes.extend(to.port().to_be_bytes());
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(acknowledgement.to_be_bytes());
    let words = 5 + options.len() as u8 / 4;
    bytes.extend([words << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(options);
}

/// A datagram.
pub fn udp(
    bytes: &mut Vec<u8>,
    macs: Macs,
    (from, to): (SocketAddrV4, SocketAddrV4),
    payload: &[u8],
) {
    let mut writer = Writer::begin(bytes, macs, (*from.ip(), *to.ip()), UDP, 0, false);
    datagram(writer.bytes, (from, to), payload.len());
    writer.bytes.extend(payload);
    writer.seal(UDP, 6);
    writer.finish();
}

/// The first fragment of a datagram whose other fragments never come.
pub fn first_fragment(
    bytes: &mut Vec<u8>,
    macs: Macs,
    (from, to): (SocketAddrV4, SocketAddrV4),
    id: u16,
) {
    let payload = [0x5a; 24];
    let writer = Writer::begin(bytes, macs, (*from.ip(), *to.ip()), UDP, id, true);
    datagram(writer.bytes, (from, to), 1400);
    writer.bytes.extend(payload);
    writer.finish();
}

fn datagram(bytes: &mut Vec<u8>, (from, to): (SocketAddrV4, SocketAddrV4), payload: usize) {
    bytes.extend(from.port().to_be_bytes());
    bytes.extend(to.port().to_be_bytes());
    bytes.extend((8 + payload as u16).to_be_bytes());
    bytes.extend([0, 0]);
}

/// An ICMP error of this type and code, from `from`, which quotes a TCP segment of `quoted`.
pub fn icmp_error(
    bytes: &mut Vec<u8>,
    macs: Macs,
    (from, to): (Ipv4Addr, Ipv4Addr),
    [kind, code]: [u8; 2],
    quoted: (SocketAddrV4, SocketAddrV4),
    sequence: u32,
) {
    let mut quote = Vec::with_capacity(ETHERNET + IP + 24);
    tcp(&mut quote, macs, quoted, (sequence, 0), ACK, b"");
    let mut writer = Writer::begin(bytes, macs, (from, to), ICMP, 0, false);
    // An MTU of 576 bytes: the kernel's least, and only a "fragmentation needed" has one.
    writer.bytes.extend([kind, code, 0, 0, 0, 0, 0x02, 0x40]);
    writer.bytes.extend(&quote[ETHERNET..]);
    let l4 = ETHERNET + IP;
    let sum = checksum(&writer.bytes[l4..], 0);
    writer.put(l4 + 2, sum);
    writer.finish();
}

fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2);
    words.map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |&low| u32::from(low))).sum()
}

/// RFC 1071, over bytes and what was summed up before.
fn checksum(bytes: &[u8], before: u32) -> u16 {
    let sum = sum(bytes) + before;
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}
