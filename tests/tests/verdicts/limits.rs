//! Limits of new flows per source.

use slb_common::{
    abi::{self, Limits, ListenerFlags},
    verdict::Verdict,
};
use slb_user::state::Policy;

use crate::{
    fixture::{FAMILIES, Slb, at, datagram, endpoint, port, syn, vip, with_slb},
    frame::ACK,
    lab::WAN,
};

/// Far more than a test takes, in nanoseconds.
const HOUR: u64 = 3_600_000_000_000;

/// Lets the listener take three flows of one source at once.
fn limit(slb: &mut Slb<'_>, at: abi::Endpoint) {
    slb.change(|state| {
        let service = state.listeners.get_mut(&at).expect("a listener");
        let flags = ListenerFlags::GUARDED | ListenerFlags::LIMITED;
        service.policy = Policy { flags, ..Policy::default() };
        let (source_ns, source_burst) = (HOUR, 2 * HOUR);
        let limits = Limits { source_ns, source_burst, ..Limits::default() };
        state.limits.insert(service.id, limits);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_limit_per_source_when_one_has_too_many_flows_then_others_get_in_during_a_flood() {
    with_slb(|slb| {
        for family in FAMILIES {
            for (port, proto) in [(port::HTTP, abi::TCP), (port::SIP, abi::UDP)] {
                limit(slb, endpoint(vip(family, port), proto));
                let begin = |addr: &str, sport| {
                    let (from, to) = (at(addr, sport), vip(family, port));
                    if proto == abi::TCP { syn(from, to) } else { datagram(from, to) }
                };
                let verdict = |slb: &mut Slb<'_>, frame: &crate::frame::Frame| {
                    slb.run(WAN, &frame.bytes()).verdict
                };
                // The second is of the same IPv6 network, or another IPv4 address.
                let [own, near, other] = [
                    ["198.51.100.7", "198.51.100.8", "198.51.101.7"],
                    ["2001:db8:100::7", "2001:db8:100::8", "2001:db8:100:1::7"],
                ][family];
                for sport in 5_000..5_003 {
                    assert_eq!(verdict(slb, &begin(own, sport)), Verdict::Forwarded);
                }
                assert_eq!(verdict(slb, &begin(own, 5_003)), Verdict::SourceLimit);
                let expected = [Verdict::Forwarded, Verdict::SourceLimit][family];
                assert_eq!(verdict(slb, &begin(near, 5_000)), expected);
                let again = begin(own, 5_000);
                let again = if proto == abi::TCP { again.flags(ACK) } else { again };
                assert_eq!(verdict(slb, &again), Verdict::Forwarded, "it goes on");
                for number in 0..20_000_u32 {
                    let (net, host) = (number >> 8, number & 0xff);
                    let from =
                        [format!("100.64.{net}.{host}"), format!("2001:db8:f00d:{number:x}::1")];
                    assert_eq!(verdict(slb, &begin(&from[family], 5_000)), Verdict::Forwarded);
                }
                assert_eq!(verdict(slb, &begin(other, 5_000)), Verdict::Forwarded);
            }
        }
    });
}
