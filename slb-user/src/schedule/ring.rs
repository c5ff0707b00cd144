//! Weighted round robin: flow number `n` gets slot `n` modulo the length of the ring.
//!
//! Shares are exact after each turn of the ring and never off by a whole flow within one. For that,
//! a member that is owed a share `f` of all slots has one slot in each window from `k / f` to
//! `(k + 1) / f`. Among the members whose window is open the one whose window closes first goes
//! next; as on a processor that is exactly busy, earliest deadline first then meets all of them.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{Member, weighted};

/// The ring for `members`, interleaved; empty if no member has weight.
///
/// Each id appears as often as its weight says, divided by the greatest common divisor of all
/// weights. If that makes more than `limit` slots, `limit` slots are shared out by largest
/// remainder, but none of the members is left without one; of more than `limit` members, the
/// heaviest get a slot each.
#[must_use]
pub fn ring(members: &[Member], limit: usize) -> Vec<u32> {
    let shares = shares(weighted(members), limit);
    let length: usize = shares.iter().map(|share| share.slots).sum();
    let mut windows: Vec<_> =
        (0..shares.len()).flat_map(|member| shares[member].windows(member, length)).collect();
    windows.sort_unstable();

    let mut closed = windows.into_iter().peekable();
    let mut open = BinaryHeap::with_capacity(shares.len());
    (0..length)
        .map(|now| {
            while let Some(Window { opens, closes, member }) =
                closed.next_if(|window| window.opens <= now)
            {
                // Of two that close together the narrower goes first, to keep clear of the next
                // slot of the same member.
                open.push(Reverse((closes, Reverse(opens), member)));
            }
            let Reverse((_, _, member)) = open.pop().expect("there are as many windows as slots");
            shares[member].id
        })
        .collect()
}

/// A member's part of the ring.
struct Share {
    id: u32,
    slots: usize,
}

/// Where one of a member's slots may be.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Window {
    /// The first place.
    opens: usize,
    /// The place after the last.
    closes: usize,
    /// Index.
    member: usize,
}

impl Share {
    fn windows(&self, member: usize, length: usize) -> impl Iterator<Item = Window> {
        let slots = self.slots;
        (0..slots).map(move |turn| Window {
            opens: turn * length / slots,
            closes: ((turn + 1) * length).div_ceil(slots),
            member,
        })
    }
}

/// How many slots each member gets, in the order of `members`.
fn shares(mut members: Vec<Member>, limit: usize) -> Vec<Share> {
    let divisor = members.iter().fold(0, |divisor, member| gcd(divisor, member.weight)).max(1);
    for member in &mut members {
        member.weight /= divisor;
    }
    let total: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
    if total <= limit as u64 {
        let exact = |member: &Member| Share { id: member.id, slots: member.weight as usize };
        return members.iter().map(exact).collect();
    }
    if members.len() > limit {
        // Stable: which of the equally heavy stay depends on no more than their order.
        members.sort_by_key(|member| Reverse(member.weight));
        members.truncate(limit);
    }
    let slots = apportion(&members, limit as u64);
    members.iter().zip(slots).map(|(member, slots)| Share { id: member.id, slots }).collect()
}

/// Shares `seats` out in proportion to weight; there are at least as many as members.
fn apportion(members: &[Member], mut seats: u64) -> Vec<usize> {
    let weight = |index: usize| u64::from(members[index].weight);
    let mut slots = vec![1; members.len()];
    let mut pool: u64 = (0..members.len()).map(weight).sum();

    // Who is owed less than a seat has one all the same, at the expense of the others.
    let mut order: Vec<_> = (0..members.len()).collect();
    order.sort_by_key(|&index| weight(index));
    let owed_one = order
        .iter()
        .take_while(|&&index| {
            let less = weight(index) * seats < pool;
            if less {
                seats -= 1;
                pool -= weight(index);
            }
            less
        })
        .count();

    let mut order = order.split_off(owed_one);
    for &index in &order {
        slots[index] = (weight(index) * seats / pool) as usize;
    }
    let taken: u64 = order.iter().map(|&index| slots[index] as u64).sum();
    order.sort_by_key(|&index| Reverse(weight(index) * seats % pool));
    for &index in &order[..(seats - taken) as usize] {
        slots[index] += 1;
    }
    slots
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schedule::fixtures::{count, members};

    const LIMIT: usize = 65_536;

    /// The largest difference, over all beginnings of the ring, between the slots that a member has
    /// and those that it is owed.
    fn lag(ring: &[u32], id: u32) -> f64 {
        let share = count(ring, id) as f64 / ring.len() as f64;
        let mut slots = 0.0;
        let lags = ring.iter().zip(1..).map(|(&slot, length)| {
            slots += f64::from(u8::from(slot == id));
            (slots - share * f64::from(length)).abs()
        });
        lags.fold(0.0, f64::max)
    }

    #[test]
    fn given_no_member_with_weight_when_made_then_the_ring_is_empty() {
        assert!(ring(&[], LIMIT).is_empty(), "no members");
        assert!(ring(&members([0, 0]), LIMIT).is_empty(), "no weight");
        assert!(ring(&members([1, 2]), 0).is_empty(), "no room");
    }

    #[test]
    fn given_equal_weights_when_made_then_each_member_has_one_slot() {
        let mut slots = ring(&members([100; 7]), LIMIT);
        slots.sort_unstable();
        assert_eq!(slots, [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn given_a_heavy_member_when_made_then_the_others_are_spread_between_its_slots() {
        let slots = ring(&members([50, 10, 10]), LIMIT);
        assert_eq!((slots.len(), count(&slots, 1), count(&slots, 2)), (7, 5, 1));
        let [second, third] = [2, 3].map(|id| slots.iter().position(|&slot| slot == id).unwrap());
        assert!(second.abs_diff(third) >= 2, "not one after the other: {slots:?}");

        let slots = ring(&members([2, 1, 1]), LIMIT);
        let twice = slots.windows(2).any(|pair| pair[0] == pair[1]);
        assert!(!twice && slots[0] != slots[3], "no member twice in a row: {slots:?}");
    }

    #[test]
    fn given_more_slots_than_fit_when_made_then_the_limit_is_shared_out() {
        let cases: [(&str, &[u32], usize, &[usize]); 5] = [
            ("largest remainder", &[5, 3, 3], 10, &[4, 3, 3]),
            ("exact after scaling", &[8, 4, 3, 1], 16, &[8, 4, 3, 1]),
            ("no member without a slot", &[1000, 1, 1], 10, &[8, 1, 1]),
            ("as many slots as members", &[7, 5, 3], 3, &[1, 1, 1]),
            ("more members than slots", &[1, 9, 2, 9], 3, &[0, 1, 1, 1]),
        ];
        for (case, weights, limit, expected) in cases {
            let slots = ring(&members(weights.iter().copied()), limit);
            let counts: Vec<_> = (1..).zip(weights).map(|(id, _)| count(&slots, id)).collect();
            assert_eq!(counts, expected, "{case}");
        }
    }

    #[test]
    fn given_a_thousand_mixed_weights_when_made_then_the_ring_has_the_limits_length() {
        let slots = ring(&members((1..=1000).map(|n| 90 + n % 11)), LIMIT);
        assert_eq!(slots.len(), LIMIT);
        assert!(lag(&slots, 1) < 1.0);
    }

    proptest! {
        #[test]
        fn given_any_weights_when_made_then_shares_are_exact_and_never_off_by_a_slot(
            weights in proptest::collection::vec(0_u32..=100, 1..20),
        ) {
            let divisor = weights.iter().fold(0, |divisor, &weight| gcd(divisor, weight)).max(1);
            let members = members(weights);
            let slots = ring(&members, LIMIT);
            for Member { id, weight, .. } in members {
                prop_assert_eq!(count(&slots, id), (weight / divisor) as usize);
                prop_assert!(lag(&slots, id) < 1.0, "{} is off by {}", id, lag(&slots, id));
            }
        }

        #[test]
        fn given_any_weights_and_limit_when_made_then_no_member_is_left_out_while_there_is_room(
            weights in proptest::collection::vec(1_u32..=100, 1..20),
            limit in 20_usize..200,
        ) {
            let members = members(weights);
            let slots = ring(&members, limit);
            prop_assert!(slots.len() <= limit);
            for Member { id, .. } in members {
                prop_assert!(count(&slots, id) > 0, "{} is left out", id);
            }
        }

        #[test]
        fn given_the_same_members_when_their_order_differs_then_the_ring_does_not(
            (ordered, shuffled) in proptest::collection::vec(0_u32..=100, 1..20)
                .prop_map(members)
                .prop_flat_map(|members| (Just(members.clone()), Just(members).prop_shuffle())),
            limit in 1_usize..200,
        ) {
            prop_assert_eq!(ring(&ordered, limit), ring(&shuffled, limit));
        }
    }
}
