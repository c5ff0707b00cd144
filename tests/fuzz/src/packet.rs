//! A frame from the wire: parsed, translated, put into a tunnel and taken out of it, answered. It may be the first
//! buffer of a longer one.
//!
//! The packet path wraps where the verifier knows that nothing overflows; here an overflow is a failure.

#![no_main]

use libfuzzer_sys::fuzz_target;
use slb_common::{
    abi::{Address, FlowKind, NatRewrite, NatTuple, NextHop, Packet, TCP},
    frame::Frame,
    icmp,
    icmp_error::{self, HEAD_V4, HEAD_V6, Problem},
    icmp_nat64, mss, nat64,
    packet::FRAGMENT_NONE,
    parse::{self, Reject},
    proxy_protocol::{self, Options, Words},
    quic, reset, rewrite,
    tunnel::{self, GUE_PORT, Tunnel},
};

/// Room in front of a frame, for what a tunnel adds.
const ROOM: usize = 64;
/// Where VLAN tags are.
const TAGS: usize = 12;
/// Bytes of a frame of several buffers that are not in the first.
const ELSEWHERE: usize = 4_096;

fn hop() -> NextHop {
    NextHop { ifindex: 7, dst_mac: [2, 0, 0, 0, 0, 1], src_mac: [2, 0, 0, 0, 0, 2] }
}

fn backend(is_v4: bool) -> Address {
    let text = if is_v4 { "10.0.0.11" } else { "2001:db8:10::11" };
    Address::from(text.parse::<std::net::IpAddr>().expect("an address"))
}

/// `len` is that of all its buffers.
fn parsed(bytes: &mut [u8], len: usize) -> Option<Packet> {
    let frame = Frame::from_slice(bytes);
    let mut packet = Packet::default();
    let result = match parse::family(&frame) {
        Ok(family) => parse::packet_of(&frame, family, &mut packet),
        Err(reject) => Err(reject),
    };
    let result = match result {
        Err(Reject::Rest) => parse::rest(&frame, &mut packet, len),
        other => other,
    };
    result.is_ok().then_some(packet)
}

/// What a client's packet goes through.
fn forward(bytes: &[u8], packet: &Packet, len: usize) {
    let to = NatRewrite {
        addr: backend(packet.is_v4()),
        sport: 4_000,
        dport: 8_080,
        kind: FlowKind::Original,
    };
    let mut copy = bytes.to_vec();
    let mut frame = Frame::from_slice(&mut copy);
    mss::clamp(&mut frame, packet, 1_400);
    if rewrite::translate(&mut frame, packet, &to, hop()).is_ok() {
        let again = parsed(&mut copy, len).expect("a packet stays one");
        assert_eq!(again.l4, packet.l4);
        assert!(again.key.dst.same(to.addr));
    }
    let ends = NatTuple {
        src: backend(packet.is_v4()),
        dst: to.addr,
        sport: 40_000,
        dport: 8_080,
        spare: 0,
    };
    let mut copy = bytes.to_vec();
    let _ = rewrite::translate_ends(&mut Frame::from_slice(&mut copy), packet, &ends, hop());
    let mut copy = bytes.to_vec();
    let _ = reset::write(&mut Frame::from_slice(&mut copy), packet);
    let mut copy = bytes.to_vec();
    let frame = Frame::from_slice(&mut copy);
    let _ = (nat64::has_checksum(&frame, packet), nat64::header(&frame, packet));
    let _ = quic::connection_id(&frame, packet);
    for (is_v4, port) in [(true, 0), (true, GUE_PORT), (false, 0), (false, GUE_PORT)] {
        encapsulate(bytes, packet, is_v4, port);
    }
}

/// The options of a segment, as a backend gets them that is told about the client.
fn options(bytes: &[u8], packet: &Packet) {
    let l4 = packet.l4 as usize;
    let Some(header) = bytes.get(l4..l4 + 20) else { return };
    let end = l4 + usize::from(header[12] >> 4) * 4;
    let Some(found) = bytes.get(l4 + 20..end) else { return };
    let mut options = Options::default();
    options.found[..found.len()].copy_from_slice(found);
    let mut words = Words::default();
    proxy_protocol::write(&mut words, false, &packet.key);
    let more = proxy_protocol::len(false, packet.key.src.is_v4());
    let before = found.len() as u32;
    let after = proxy_protocol::make_options(&mut options, before, &words, more);
    assert!(after <= 40 && after.is_multiple_of(4), "{after} bytes of options");
    assert!(more <= after, "the backend is told");
    let delta = proxy_protocol::options_delta(&options);
    let mut copy = bytes.to_vec();
    let mut frame = Frame::from_slice(&mut copy);
    let ends = (end - l4) as u32;
    let ends = (ends, ends - before + after);
    let _ = proxy_protocol::account(&mut frame, packet.is_v4(), l4, ends, delta, true);
    let _ = proxy_protocol::clear_urgent(&mut frame, l4);
}

/// What its sender is told if it cannot be forwarded.
fn refuse(bytes: &[u8], packet: &Packet) {
    let head = if packet.is_v4() { HEAD_V4 } else { HEAD_V6 };
    let quoted = &bytes[..bytes.len().min(icmp_error::quoted_len(packet))];
    let mut made = [vec![0; head], quoted.to_vec()].concat();
    let _ = icmp_error::is_to_be_told(&Frame::from_slice(&mut made), packet);
    for problem in [Problem::TooBig(1_400), Problem::PortUnreachable] {
        let _ = icmp_error::write(&mut Frame::from_slice(&mut made), packet.is_v4(), problem);
    }
}

/// Into a tunnel, and out of it again.
fn encapsulate(bytes: &[u8], packet: &Packet, is_v4: bool, port: u16) {
    let (dst, src) = (backend(is_v4), backend(is_v4));
    let tunnel = Tunnel { dst, src, hop: hop(), hash: 0x1234_5678_9abc_def0, port };
    let mut grown = [vec![0; tunnel.overhead()], bytes.to_vec()].concat();
    if tunnel::write(&mut Frame::from_slice(&mut grown), packet.is_v4(), &tunnel).is_ok() {
        let decap = tunnel::inner(&Frame::from_slice(&mut grown), GUE_PORT);
        if let Some(decap) = decap {
            let _ = tunnel::unwrap(&mut Frame::from_slice(&mut grown), &decap);
        }
    }
}

/// What an ICMP message goes through.
fn message(bytes: &[u8]) {
    let mut copy = bytes.to_vec();
    let _ = icmp::answer_echo(&mut Frame::from_slice(&mut copy));
    let mut copy = bytes.to_vec();
    let Some(quote) = icmp::quote(&Frame::from_slice(&mut copy)) else { return };
    let is_v4 = quote.packet.is_v4();
    let addr = backend(is_v4);
    let to = NatRewrite { addr, sport: 4_000, dport: 80, kind: FlowKind::Reply };
    let _ = icmp::recount(&mut Frame::from_slice(&mut copy), &quote, Some(7), 28);
    let _ = icmp::translate_error(&mut Frame::from_slice(&mut copy), &quote, &to, addr, hop());
    let mut copy = [bytes, &[0; ROOM]].concat();
    let mut frame = Frame::from_slice(&mut copy);
    if let Some(mut error) = icmp_nat64::read(&frame, &quote) {
        let other = backend(!is_v4);
        let ends = NatTuple { src: other, dst: other, sport: 4_000, dport: 80, spare: 0 };
        icmp_nat64::translate(&mut error, &quote.packet.key, &ends);
        let _ = icmp_nat64::write(&mut frame, &error, &ends, hop(), 7);
    }
}

/// A frame, and the bytes of it that are in other buffers.
fn frame(bytes: &[u8], elsewhere: usize) {
    let len = bytes.len() + elsewhere;
    let mut copy = bytes.to_vec();
    let Some(packet) = parsed(&mut copy, len) else { return };
    assert!(packet.l4 as usize <= bytes.len(), "the transport header is in the frame");
    forward(bytes, &packet, len);
    if packet.key.proto == TCP && packet.fragment == FRAGMENT_NONE {
        options(bytes, &packet);
    }
    refuse(bytes, &packet);
}

fuzz_target!(|bytes: &[u8]| {
    let mut untagged = bytes.to_vec();
    let _ = tunnel::inner(&Frame::from_slice(&mut untagged), GUE_PORT);
    let tags = parse::tags(&Frame::from_slice(&mut untagged));
    if tags > 0 {
        untagged.drain(TAGS..TAGS + 4 * tags);
    }
    frame(&untagged, 0);
    frame(&untagged, ELSEWHERE);
    message(&untagged);
});
