use std::{
    format,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use proptest::prelude::*;

use super::*;
use crate::{parse::TcpFlags, verdict::Verdict};

fn addresses() -> impl Strategy<Value = Address> {
    prop_oneof![
        any::<[u8; 16]>().prop_map(|bytes| Address { bytes }),
        any::<[u8; 4]>().prop_map(|v4| IpAddr::from(v4).into()),
    ]
}

proptest! {
    #[test]
    fn given_any_ip_address_when_converted_and_back_then_it_is_the_same(
        v4 in any::<[u8; 4]>(),
        v6 in any::<[u8; 16]>(),
    ) {
        let v4 = IpAddr::from(v4);
        let v6 = Ipv6Addr::from(v6);
        prop_assert_eq!(IpAddr::from(Address::from(v4)), v4);
        // A mapped address is an IPv4 address.
        prop_assert_eq!(IpAddr::from(Address::from(IpAddr::from(v6))), v6.to_canonical());
        prop_assert!(Address::from(v4).is_v4());
        prop_assert_eq!(Address::from(IpAddr::from(v6)).is_v4(), v6.to_ipv4_mapped().is_some());
    }

    #[test]
    fn given_two_addresses_when_compared_then_same_is_equality(
        a in addresses(),
        b in addresses(),
        byte in 0..16_usize,
        bit in 0..8_u32,
    ) {
        prop_assert_eq!(a.same(b), a == b);
        prop_assert!(a.same(a));
        let mut near = a;
        near.bytes[byte] ^= 1 << bit;
        prop_assert!(!a.same(near), "bit {} of byte {}", bit, byte);
    }

    #[test]
    fn given_any_address_when_taken_apart_then_it_can_be_put_together(a in addresses()) {
        prop_assert_eq!(Address::from_halves(a.halves()), a);
        let [high, low] = a.halves();
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&high.to_ne_bytes());
        bytes[8..].copy_from_slice(&low.to_ne_bytes());
        prop_assert_eq!(Address { bytes }, a);
        if a.is_v4() {
            prop_assert_eq!(Address::from_v4_word(a.words()[3]), a);
        }
    }

    #[test]
    fn given_a_hop_when_written_to_a_frame_and_read_then_it_is_the_same(
        ifindex in any::<u32>(),
        dst_mac in any::<[u8; 6]>(),
        src_mac in any::<[u8; 6]>(),
    ) {
        let hop = NextHop { ifindex, dst_mac, src_mac };
        let words = hop.mac_words();
        let mut bytes = [0; 12];
        for (part, word) in bytes.chunks_mut(4).zip(words) {
            part.copy_from_slice(&word.to_ne_bytes());
        }
        prop_assert_eq!(&bytes[..6], &dst_mac, "a frame begins with its destination");
        prop_assert_eq!(&bytes[6..], &src_mac);
        prop_assert_eq!(NextHop::from_mac_words(ifindex, words), hop);
        prop_assert_eq!(hop.is_known(), ifindex != 0);
    }

    #[test]
    fn given_an_entry_when_asked_for_another_key_then_it_is_not_of_it(
        (src, dst) in (addresses(), addresses()),
        (sport, dport) in any::<(u16, u16)>(),
        bit in 0..(2 * 128 + 2 * 16_usize),
    ) {
        let key = FlowKey { src, dst, sport, dport, proto: TCP };
        let flow = Flow {
            tag: 2, expires: 0, src, dst, sport, dport, backend: 0, proto: 6, kind: FLOW_ORIGINAL,
            state: 0, proxy: 0, port: 0, source: 0, peer: NO_PLACE, sequence: 0,
        };
        prop_assert!(flow.is_of(&key));
        prop_assert_eq!(flow.key(), key);
        let datagram = FlowKey { proto: UDP, ..key };
        prop_assert!(!flow.is_of(&datagram));
        let mut other = key;
        match bit {
            0..128 => other.src.bytes[bit / 8] ^= 1 << (bit % 8),
            128..256 => other.dst.bytes[(bit - 128) / 8] ^= 1 << (bit % 8),
            256..272 => other.sport ^= 1 << (bit - 256),
            _ => other.dport ^= 1 << (bit - 272),
        }
        prop_assert!(!flow.is_of(&other), "bit {}", bit);
    }
}

#[test]
fn given_addresses_when_printed_then_they_read_as_usual() {
    let cases = [
        ("203.0.113.10", "203.0.113.10"),
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
    ];
    for (addr, expected) in cases {
        let addr: IpAddr = addr.parse().unwrap();
        assert_eq!(format!("{:?}", Address::from(addr)), expected);
    }
}

#[test]
fn given_addresses_near_the_mapped_prefix_when_asked_then_only_the_prefix_is_ipv4() {
    let cases = [
        ("::ffff:0.0.0.0", true),
        ("::ffff:255.255.255.255", true),
        ("::", false),
        ("::1", false),
        ("::fffe:1.2.3.4", false),
        ("::1:ffff:1.2.3.4", false),
        ("1::ffff:1.2.3.4", false),
        ("64:ff9b::1.2.3.4", false),
    ];
    for (addr, expected) in cases {
        let addr: Ipv6Addr = addr.parse().unwrap();
        assert_eq!(Address::from(IpAddr::V6(addr)).is_v4(), expected, "{addr}");
    }
}

#[test]
fn given_an_ipv4_address_when_converted_then_it_is_in_network_order() {
    let addr = Address::from(IpAddr::V4(Ipv4Addr::new(1, 2, 3, 4)));
    assert_eq!(addr.bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 2, 3, 4]);
    assert_eq!(addr, Address::from_v4_word(u32::from_ne_bytes([1, 2, 3, 4])));
}

#[test]
fn given_state_bits_when_asked_then_only_a_verified_end_is_one_and_a_claim_is_not_active() {
    use ConnState as State;
    let cases = [
        (State::empty(), false, true),
        (State::ESTABLISHED, false, true),
        (State::END_CLAIMED, false, false),
        (State::FIN_REPLY, false, true),
        (State::END_CLAIMED | State::FIN_REPLY, false, false),
        (State::ENDED, true, false),
        (State::RST_PENDING, true, false),
        (State::ENDED | State::END_CLAIMED | State::FIN_REPLY, true, false),
    ];
    for (state, has_ended, is_active) in cases {
        assert_eq!((state.has_ended(), state.is_active()), (has_ended, is_active), "{state:?}");
    }
}

#[test]
fn given_a_reset_when_its_bits_are_compared_then_state_and_tcp_flags_have_different_ones() {
    assert_eq!(ConnState::ENDED.bits() & TcpFlags::RST.bits(), 0);
    assert_eq!(ConnState::RST_PENDING.bits() & TcpFlags::RST.bits(), 0);
}

#[test]
fn given_flow_keys_when_turned_around_then_twice_is_the_same() {
    let [src, dst] = [[1, 2, 3, 4], [5, 6, 7, 8]].map(|addr| IpAddr::from(addr).into());
    let key = FlowKey { src, dst, sport: 1, dport: 2, proto: TCP };
    assert_eq!(key.reversed(), FlowKey { src: dst, dst: src, sport: 2, dport: 1, proto: TCP });
    assert_eq!(key.reversed().reversed(), key);
    assert_eq!(key.destination(), Endpoint { addr: dst, port: 2, proto: TCP });
    assert_eq!(key.source(), Endpoint { addr: src, port: 1, proto: TCP });
}

#[test]
fn given_any_task_when_it_is_packed_then_it_can_be_read() {
    let kinds = [FlowKind::Original, FlowKind::Reply, FlowKind::Bypass];
    let verdicts = Verdict::ALL.iter().map(|&verdict| Task::Answer(verdict));
    for task in kinds.map(Task::Pass).into_iter().chain(verdicts) {
        let mut args = TailCallArgs::default();
        args.set_task(task);
        assert_eq!(args.task(), task);
        for kind in kinds {
            assert_eq!(args.is(kind), task == Task::Pass(kind), "{task:?}");
        }
    }
}

#[test]
fn given_no_task_when_it_is_read_then_the_packet_is_not_answered() {
    for task in [0, 4, 255, u32::MAX] {
        let args = TailCallArgs { task, ..TailCallArgs::default() };
        assert_eq!(args.task(), Task::Answer(Verdict::Inconsistent), "{task}");
    }
}

#[test]
fn given_the_number_of_a_kind_when_it_is_converted_then_others_are_none() {
    let numbers = (0..=u8::MAX).filter_map(|number| Some((number, FlowKind::from_number(number)?)));
    let expected = [(FLOW_ORIGINAL, FlowKind::Original), (FLOW_REPLY, FlowKind::Reply)];
    let expected = expected.into_iter().chain([(FLOW_BYPASS, FlowKind::Bypass)]);
    assert!(numbers.eq(expected));
}
