//! Frames cut short, at every byte.

use etherparse::{IpNumber, TcpHeader, UdpHeader};
use slb_common::verdict::Verdict;

use crate::{
    fixture::{
        FAMILIES, Outcome, answer, backend, client, datagram, forwarded, port, syn, vip, with_slb,
    },
    frame::{Extension, Frame, L3, Transport, seal_v4},
    lab::{FIRST, LAN, WAN},
};

/// With all that a frame can have between its headers.
fn rich(frame: Frame) -> Frame {
    let options = vec![1; 8];
    let mut frame = frame;
    if let Transport::Tcp { options, .. } = &mut frame.transport {
        *options = vec![1; 12];
    }
    if frame.src.is_ipv4() {
        return Frame { v4_options: options, ..frame };
    }
    let extensions = vec![
        Extension::padding(IpNumber::IPV6_HEADER_HOP_BY_HOP),
        Extension::padding(IpNumber::IPV6_DESTINATION_OPTIONS),
        Extension::Fragment(0, false),
    ];
    Frame { extensions, ..frame }
}

/// Length up to which a frame does not say where it goes. The kernel runs no test on fewer than 14
/// bytes.
const fn anonymous(family: usize) -> usize {
    L3 + [20, 40][family]
}

#[test]
#[ignore = "needs root"]
fn given_a_frame_to_a_vip_when_cut_at_any_byte_then_it_is_never_forwarded() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            for frame in [
                rich(syn(from, vip(family, port::HTTP))),
                rich(datagram(from, vip(family, port::DNS))),
                rich(syn(from, vip(family, 9))),
            ] {
                let bytes = frame.bytes();
                for len in L3..bytes.len() {
                    let verdict =
                        if len < anonymous(family) { Verdict::NotOurs } else { Verdict::Truncated };
                    let case = format!("{len} bytes of {frame:?}");
                    slb.check(&case, WAN, &bytes[..len], &Outcome::Untouched(verdict));
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_frame_to_others_when_cut_at_any_byte_then_it_is_the_kernels() {
    with_slb(|slb| {
        for family in FAMILIES {
            let http = rich(syn(client(family, 1_000), vip(family, port::HTTP)));
            let inside = http.to(backend(0, family, port::HTTP_BACKEND));
            slb.client_sends("a flow", &http, &forwarded(inside.clone(), FIRST));
            for (ingress, frame) in [(WAN, inside.clone()), (LAN, answer(&inside))] {
                let bytes = frame.bytes();
                for len in L3..bytes.len() {
                    let case = format!("{len} bytes of {frame:?}");
                    let expected = Outcome::Untouched(Verdict::NotOurs);
                    slb.check(&case, ingress, &bytes[..len], &expected);
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_padded_frame_when_cut_within_its_padding_then_it_is_forwarded() {
    with_slb(|slb| {
        for family in FAMILIES {
            for padding in 0..20 {
                let http = syn(client(family, 1_000), vip(family, port::HTTP));
                let frame = Frame { padding, ..rich(http) };
                let inside = frame.to(backend(0, family, port::HTTP_BACKEND));
                slb.client_sends("padded", &frame, &forwarded(inside, FIRST));
            }
        }
    });
}

/// The network header is right, and what it leaves is too short for a transport header.
#[test]
#[ignore = "needs root"]
fn given_a_short_packet_when_it_ends_in_its_transport_header_then_it_is_dropped() {
    with_slb(|slb| {
        for family in FAMILIES {
            let from = client(family, 1_000);
            let frames = [
                (TcpHeader::MIN_LEN, syn(from, vip(family, port::HTTP))),
                (UdpHeader::LEN, datagram(from, vip(family, port::DNS))),
            ];
            for (header, frame) in frames {
                for len in 0..header {
                    let other = frame.clone();
                    let number = IpNumber([6, 17][usize::from(header == UdpHeader::LEN)]);
                    let payload = frame.bytes()[frame.l4()..][..len].to_vec();
                    let short = Frame { transport: Transport::Other(number), payload, ..other };
                    let case = format!("{len} bytes of {header}");
                    slb.client_sends(&case, &short, &Outcome::Untouched(Verdict::Truncated));
                    let padded = Frame { padding: 40, ..short };
                    slb.client_sends(&case, &padded, &Outcome::Untouched(Verdict::Malformed));
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_ipv4_options_when_the_packet_ends_within_them_then_it_is_dropped() {
    with_slb(|slb| {
        let frame = rich(syn(client(0, 1_000), vip(0, port::HTTP)));
        for len in 20_u8..28 {
            let mut bytes = frame.bytes();
            bytes[L3 + 3] = len;
            seal_v4(&mut bytes);
            let case = format!("{len} bytes");
            slb.check(&case, WAN, &bytes, &Outcome::Untouched(Verdict::Malformed));
        }
    });
}
