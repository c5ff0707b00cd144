use std::{boxed::Box, net::IpAddr, vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::abi::{TCP, UDP};

const FLOWS: u32 = 65_536;
const BUCKETS: u32 = 64;
const OTHER: Seed = Seed::new([
    0x9fb2_1c65_1e98_df25,
    0xa5cb_9243_f1ce_07b3,
    0xd1b5_4a32_d192_ed03,
    0xaef1_7502_b3a1_f5c9,
    0xdb4f_0b91_75ae_2165,
]);

fn key(src: impl Into<IpAddr>, sport: u16, dst: &str) -> FlowKey {
    let dst: IpAddr = dst.parse().unwrap();
    FlowKey { src: src.into().into(), dst: dst.into(), sport, dport: 443, proto: TCP }
}

/// A client of 2001:db8::/32 with these subnet and host numbers.
fn v6(subnet: u16, host: u32) -> [u16; 8] {
    [0x2001, 0xdb8, 0, subnet, 0, 0, (host >> 16) as u16, host as u16]
}

/// How far the flows are from an even spread; for an ideal hash around [`BUCKETS`] - 1.
fn chi_square(flows: &[FlowKey], place: impl Fn(&FlowKey) -> u32) -> f64 {
    let mut buckets = vec![0_u32; BUCKETS as usize];
    for key in flows {
        buckets[place(key) as usize] += 1;
    }
    let expected = f64::from(FLOWS / BUCKETS);
    buckets.iter().map(|&found| (f64::from(found) - expected).powi(2) / expected).sum()
}

#[test]
fn given_regular_clients_when_hashed_then_the_buckets_are_filled_evenly() {
    let v4 = |client: u32| (0x0a00_0000 + client).to_be_bytes();
    let flows = || 0..FLOWS;
    let vip6 = "2001:db8:113::10";
    let vip4 = "203.0.113.10";
    let cases: [(&str, Vec<FlowKey>); 8] = [
        ("IPv4, ports", flows().map(|n| key(v4(1), n as u16, vip4)).collect()),
        ("IPv4, clients", flows().map(|n| key(v4(n), 40_000, vip4)).collect()),
        ("IPv4, networks", flows().map(|n| key(v4(n << 8), 40_000, vip4)).collect()),
        (
            "IPv4, clients and ports",
            flows().map(|n| key(v4(n >> 8), 1024 + (n & 0xff) as u16, vip4)).collect(),
        ),
        ("IPv4, even ports", {
            let client = |n| v4(n >> 15);
            flows().map(|n| key(client(n), (n as u16) << 1, vip4)).collect()
        }),
        ("IPv6, ports", flows().map(|n| key(v6(0, 1), n as u16, vip6)).collect()),
        ("IPv6, clients", flows().map(|n| key(v6(0, n), 40_000, vip6)).collect()),
        ("IPv6, networks", flows().map(|n| key(v6(n as u16, 1), 40_000, vip6)).collect()),
    ];
    // 63 degrees of freedom: an ideal hash exceeds this once in 10^7.
    let limit = 137.0;
    let seeds = [Seed::PUBLIC, OTHER, Seed::new(OTHER.words().map(u64::reverse_bits))];
    for ((case, flows), seed) in cases.iter().flat_map(|case| seeds.map(|seed| (case, seed))) {
        let found = chi_square(flows, |key| slot(choice(flow(key, &seed)), BUCKETS));
        assert!(found < limit, "{case}: slots, chi-square {found:.1}");
        let found = chi_square(flows, |key| flow(key, &seed) as u32 % BUCKETS);
        assert!(found < limit, "{case}: tags, chi-square {found:.1}");
        // Neighbouring ports are not independent, so nothing is expected but no crowd.
        let mut buckets = vec![0_u32; FLOWS as usize / 2];
        for key in flows {
            buckets[bucket(key, &seed, FLOWS / 2) as usize] += 1;
        }
        let fullest = buckets.into_iter().max();
        assert!(fullest < Some(16), "{case}: {fullest:?} of 2 in a bucket");
    }
}

/// Sums of products are alike where what differs in two words cancels out.
#[test]
fn given_clients_ports_and_vips_when_combined_then_each_flow_has_a_hash_and_slots_fill_evenly() {
    type ClientNextHop = fn(u8, u8) -> IpAddr;
    let v4 = |network: u8, host: u8| IpAddr::from([198, 51, network, host]);
    let low = |network: u8, host: u8| v6(network.into(), host.into()).into();
    let high = |network: u8, host: u8| {
        let [network, host] = [network, host].map(|byte| u16::from(byte) << 8);
        IpAddr::from([0x2001, 0xdb8, network, 0, host, 0, 0, 0])
    };
    let families: [(_, ClientNextHop); 3] =
        [("IPv4", v4), ("IPv6, low bits", low), ("IPv6, high bits", high)];
    // Of 2^18 flows: how many bits say the port, the host, the network, and the VIP.
    for (case, client) in families {
        for bits in [[10, 8, 0], [16, 2, 0], [4, 8, 6], [6, 8, 4], [2, 8, 8], [0, 8, 4]] {
            let flows = (0..1_u32 << 18).map(|number| {
                let mut rest = number;
                let [port, host, network] = bits.map(|bits| {
                    let part = rest % (1 << bits);
                    rest >>= bits;
                    part
                });
                let to = client(200, rest as u8);
                FlowKey {
                    dst: to.into(),
                    ..key(client(network as u8, host as u8), port as u16, "::")
                }
            });
            let (mut hashes, mut slots, mut buckets) =
                (Vec::new(), vec![0_u32; 1 << 12], vec![0_u32; 1 << 17]);
            for flow in flows
                .map(|key| (super::flow(&key, &Seed::PUBLIC), bucket(&key, &Seed::PUBLIC, 1 << 17)))
            {
                hashes.push(flow.0);
                slots[slot(choice(flow.0), 1 << 12) as usize] += 1;
                buckets[flow.1 as usize] += 1;
            }
            hashes.sort_unstable();
            hashes.dedup();
            assert_eq!(hashes.len(), 1 << 18, "{case}, {bits:?}");
            // 64 each, by eight standard deviations.
            let fullest = slots.into_iter().max();
            assert!(fullest < Some(128), "{case}, {bits:?}: {fullest:?} of 64 in a slot");
            let fullest = buckets.into_iter().max();
            assert!(fullest < Some(16), "{case}, {bits:?}: {fullest:?} of 2 in a bucket");
        }
    }
}

#[test]
fn given_a_tuple_when_any_bit_changes_then_half_of_the_hash_does() {
    let vips =
        [("203.0.113.10", IpAddr::from([198, 51, 100, 7])), ("2001:db8::10", v6(1, 1).into())];
    for (vip, client) in vips {
        let (mut changed, mut changes) = (0, 0);
        for sport in 0..64 {
            let base = key(client, sport, vip);
            let first = if base.src.is_v4() { 12 } else { 0 };
            let mut neighbours = Vec::new();
            for bit in first * 8..128 {
                let mut src = base;
                src.src.bytes[bit / 8] ^= 1 << (bit % 8);
                let mut dst = base;
                dst.dst.bytes[bit / 8] ^= 1 << (bit % 8);
                neighbours.extend([src, dst]);
            }
            for bit in 0..16 {
                neighbours.push(FlowKey { sport: base.sport ^ 1 << bit, ..base });
                neighbours.push(FlowKey { dport: base.dport ^ 1 << bit, ..base });
            }
            neighbours.push(FlowKey { proto: UDP, ..base });
            for neighbour in neighbours {
                let bits =
                    (flow(&base, &Seed::PUBLIC) ^ flow(&neighbour, &Seed::PUBLIC)).count_ones();
                assert!(bits >= 2, "{base:?} and {neighbour:?} differ in {bits} bits");
                changed += bits;
                changes += 1;
            }
        }
        let average = f64::from(changed) / f64::from(changes);
        assert!((31.0..33.0).contains(&average), "{vip}: {average:.2} of 64 bits");
    }
}

#[test]
fn given_regular_endpoints_when_indexed_then_few_share_a_hash() {
    let endpoint = |host: u32, port| Endpoint {
        addr: IpAddr::from((0x0a00_0000 + host).to_be_bytes()).into(),
        port,
        proto: TCP,
    };
    let grid = (0..1_000).flat_map(|host| [80, 443, 8_080, 8_443].map(|port| (host, port)));
    let cases: [(&str, Vec<(u32, u32)>); 3] = [
        ("hosts", (0..4_000).map(|host| (host, 8_080)).collect()),
        ("ports", (1..=4_000).map(|port| (1, port)).collect()),
        ("both", grid.collect()),
    ];
    for (case, endpoints) in cases {
        let mut seen = vec![0_u32; 65_536];
        for &(host, port) in &endpoints {
            seen[super::endpoint(&endpoint(host, port))] += 1;
        }
        // Of an ideal hash, 6 % share one.
        let shared: u32 = seen.into_iter().filter(|&count| count > 1).sum();
        assert!(shared < 400, "{case}: {shared} of {}", endpoints.len());
    }
}

#[test]
fn given_any_number_of_buckets_when_a_flow_gets_one_then_it_is_one_of_them() {
    for buckets in (1..100).chain([1_000, 65_536, u32::MAX]) {
        for sport in 0..1_000 {
            let found =
                bucket(&key([198, 51, 100, 7], sport, "203.0.113.10"), &Seed::PUBLIC, buckets);
            assert!(found < buckets, "{found} of {buckets}");
        }
    }
}

#[test]
fn given_known_tuples_when_hashed_then_the_numbers_are_those_of_every_gateway() {
    let v4 = key([198, 51, 100, 7], 40_000, "203.0.113.10");
    let v6 = key(v6(5, 7), 40_000, "2001:db8:113::10");
    assert_eq!(flow(&v4, &Seed::PUBLIC), 0x54e9_88d5_b943_d487, "IPv4");
    assert_eq!(flow(&v6, &Seed::PUBLIC), 0x01a5_80ad_9859_5c27, "IPv6");
    assert_eq!(identity(v4.dst, 80), 0xae27_8ce2_06bf_9fdf, "IPv4");
    assert_eq!(identity(v6.dst, 80), 0x43aa_3f1f_a24a_e4d1, "IPv6");
}

#[test]
fn given_the_source_as_the_choice_when_ports_differ_then_it_is_the_same_and_clients_spread() {
    const SLOTS: u32 = 16;
    let by =
        |key: &FlowKey| choice_by(Scheduler::SOURCE, key, flow(key, &Seed::PUBLIC), &Seed::PUBLIC);
    let families: [fn(u32) -> IpAddr; 2] =
        [|host| IpAddr::from((0xc633_6400 + host).to_be_bytes()), |host| v6(1, host).into()];
    for client in families {
        let mut found = [0_u32; SLOTS as usize];
        for host in 0..16_000 {
            let first = by(&key(client(host), 1_024, "203.0.113.10"));
            for (sport, to) in [(1_025, "203.0.113.10"), (60_000, "203.0.113.11")] {
                assert_eq!(by(&key(client(host), sport, to)), first, "{}", client(host));
            }
            found[slot(first, SLOTS) as usize] += 1;
        }
        // Six standard deviations of 31.
        assert!(found.iter().all(|count| count.abs_diff(1_000) < 190), "{found:?}");
    }
    let one = key([198, 51, 100, 7], 1_024, "203.0.113.10");
    let hash = flow(&one, &Seed::PUBLIC);
    assert_eq!(choice_by(Scheduler::HASH, &one, hash, &Seed::PUBLIC), choice(hash));
}

#[test]
fn given_neighbouring_backends_when_identified_then_none_is_another() {
    let mut identities: Vec<u64> = (0..=255_u8)
        .flat_map(|host| {
            let v4: Address = IpAddr::from([10, 0, 0, host]).into();
            let v6: Address = IpAddr::from(v6(0, host.into())).into();
            (8_000..8_100).flat_map(move |port| [identity(v4, port), identity(v6, port)])
        })
        .collect();
    let all = identities.len();
    identities.sort_unstable();
    identities.dedup();
    assert_eq!(identities.len(), all);
}

proptest! {
    #[test]
    fn given_any_hash_when_a_slot_is_chosen_then_it_is_one_of_them_and_order_is_kept(
        a in any::<u32>(),
        b in any::<u32>(),
        slots in 1..=u32::MAX,
    ) {
        prop_assert!(slot(a, slots) < slots);
        prop_assert!(slot(a.min(b), slots) <= slot(a.max(b), slots));
        prop_assert_eq!(slot(0, slots), 0);
        prop_assert_eq!(slot(u32::MAX, slots), slots - 1);
    }
}

#[test]
fn given_few_slots_when_chosen_then_each_gets_an_equal_part_of_the_hashes() {
    for slots in [1, 2, 3, 7, 16_381] {
        for chosen in 0..slots {
            // The first hash of a slot, and the last one of the slot before.
            let first = ((u64::from(chosen) << 32).div_ceil(slots.into())) as u32;
            assert_eq!(slot(first, slots), chosen, "of {slots}");
            assert!(chosen == 0 || slot(first - 1, slots) == chosen - 1, "of {slots}");
        }
    }
}

/// What a sender can work out who knows how hashes are made, but not this installation's seed.
#[test]
fn given_packets_that_meet_by_one_seed_when_hashed_by_another_then_they_spread() {
    const CHOSEN: usize = 1 << 12;
    let v4 = |number: u32| key(number.to_be_bytes(), number as u16, "203.0.113.10");
    let v6 = |number: u32| key(v6(number as u16, number >> 8), 40_000, "2001:db8:113::10");
    let word = |key: &FlowKey| {
        let [high, low] = key.src.halves();
        high ^ low
    };
    type Place = dyn Fn(&FlowKey, &Seed) -> u32;
    let places: [(&str, Box<Place>); 5] = [
        ("slot", Box::new(|key, seed| slot(choice(flow(key, seed)), BUCKETS))),
        ("bucket", Box::new(|key, seed| bucket(key, seed, BUCKETS * 8) / 8)),
        (
            "slot by source",
            Box::new(|key, seed| {
                let hash = flow(key, seed);
                slot(choice_by(Scheduler::SOURCE, key, hash, seed), BUCKETS)
            }),
        ),
        ("place of a source", Box::new(|key, seed| source(key.src, 7, seed) % BUCKETS)),
        ("slot by ID", Box::new(move |key, seed| slot(choice_of_id(word(key), seed), BUCKETS))),
    ];
    let families: [(&str, &dyn Fn(u32) -> FlowKey); 2] = [("IPv4", &v4), ("IPv6", &v6)];
    for (place, of) in &places {
        for (family, key) in families {
            let chosen = (0x0100_0000_u32..).map(key).filter(|key| of(key, &Seed::PUBLIC) == 0);
            let mut found = vec![0_u32; BUCKETS as usize];
            for key in chosen.take(CHOSEN) {
                found[of(&key, &OTHER) as usize] += 1;
            }
            // 64 each.
            let fullest = found.into_iter().max();
            assert!(fullest < Some(128), "{place}, {family}: {fullest:?} of 64");
        }
    }
}
