//! Weighted consistent hashing: a flow's hash picks a slot, the slot names the backend.
//!
//! After Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016),
//! section 3.4: every member has a permutation of the slots, and the members take turns at claiming
//! the next slot of their permutation that is still free. The paper's members take turns one after
//! the other; here a member's turns come at a rate that is its weight. When a turn comes, and where
//! it leads, depend on that member alone, so the others keep nearly all of their slots when one
//! comes, goes or changes weight.

use super::{Member, weighted};

/// The table for `members`: `size` ids, or none if no member has weight.
///
/// Each member gets its share of the slots by weight, give or take one or two.
///
/// # Panics
///
/// If `size` is not a prime number below 2^31: only then does every permutation reach every slot.
#[must_use]
pub fn table(members: &[Member], size: usize) -> Vec<u32> {
    let size = u32::try_from(size).ok().filter(|&size| is_prime(size)).expect("a prime below 2^31");
    let members = weighted(members);
    if members.is_empty() {
        return Vec::new();
    }
    let mut walks: Vec<_> = members.iter().map(|member| Walk::new(member.identity, size)).collect();
    let mut free = FreeSlots::new(size);
    let mut table = vec![0; size as usize];
    let claim = |member: usize| {
        let slot = walks[member].claim(&mut free, size);
        table[slot as usize] = members[member].id;
    };
    if members.len() <= FEW {
        take_turns(&members, size, claim);
    } else {
        sorted_turns(&members, size).into_iter().for_each(claim);
    }
    table
}

/// A prime table size for that many backends, at least 100 times as large: section 3.4's rule for
/// shares that differ by at most 1 %. The largest serves that rule up to 10 485 backends. The larger, the fewer
/// choices move for no reason when one comes or goes: of a hundred, 0.3 % besides the 1 % that have to.
#[must_use]
pub const fn size_for(backends: usize) -> usize {
    match backends {
        // As most groups are: a listener's table is then 8 KiB, and stays in the cache.
        0..=16 => 2_039,
        17..=64 => 16_381,
        65..=1024 => 131_071,
        _ => 1_048_573,
    }
}

/// So many members are looked through for the one whose turn is next. Of more, all turns are sorted.
const FEW: usize = 16;

/// Virtual time is fixed-point, and a member of weight `w` has `w` turns per unit; a turn number shifted this far still
/// fits.
const UNIT: u64 = 1 << 32;

/// When a member's turns come: turn `n` at `(n * UNIT + phase) / weight`, without a division for each.
struct Turns {
    due: u64,
    /// What the division has left.
    rest: u64,
    weight: u64,
    /// From one turn to the next.
    step: u64,
    rest_of_step: u64,
}

impl Turns {
    fn new(member: &Member) -> Self {
        let weight = u64::from(member.weight);
        // Without a phase, members of low weight would all wait for the same moment, and whether
        // the table ends just before or after it would be the heavier members' gain or loss.
        let phase = hash(member.identity, PHASE) % UNIT;
        Self {
            due: phase / weight,
            rest: phase % weight,
            weight,
            step: UNIT / weight,
            rest_of_step: UNIT % weight,
        }
    }

    fn advance(&mut self) {
        self.due += self.step;
        self.rest += self.rest_of_step;
        if self.rest >= self.weight {
            self.rest -= self.weight;
            self.due += 1;
        }
    }
}

/// Calls `claim` with the index of the member whose turn it is, `size` times. At the same time the first member comes
/// first.
fn take_turns(members: &[Member], size: u32, mut claim: impl FnMut(usize)) {
    let mut turns: Vec<_> = members.iter().map(Turns::new).collect();
    for _ in 0..size {
        let (mut next, mut due) = (0, u64::MAX);
        for (member, turns) in turns.iter().enumerate() {
            if turns.due < due {
                (next, due) = (member, turns.due);
            }
        }
        turns[next].advance();
        claim(next);
    }
}

/// The same members in the same order as in [`take_turns`].
fn sorted_turns(members: &[Member], size: u32) -> Vec<usize> {
    let total: u64 = members.iter().map(|member| u64::from(member.weight)).sum();
    // Until this time a member has at least `end / UNIT * weight - 1` turns, so all of them together
    // have at least `size`.
    let wanted = u64::from(size) + members.len() as u64;
    let end = (u128::from(wanted) * u128::from(UNIT)).div_ceil(u128::from(total)) as u64;

    let mut sorted = Vec::with_capacity(wanted as usize + members.len());
    for (member, mut turns) in members.iter().map(Turns::new).enumerate() {
        while turns.due < end {
            sorted.push((turns.due, member));
            turns.advance();
        }
    }
    // A run per member, which this sort finds and merges.
    sorted.sort_by_key(|&(due, _)| due);
    sorted.into_iter().take(size as usize).map(|(_, member)| member).collect()
}

/// A member's permutation of the slots, and how far the member has come in it.
struct Walk {
    next: u32,
    skip: u32,
}

impl Walk {
    fn new(identity: u64, size: u32) -> Self {
        let below = |limit: u32, salt| (hash(identity, salt) % u64::from(limit)) as u32;
        Self { next: below(size, OFFSET), skip: 1 + below(size - 1, SKIP) }
    }

    /// Claims the next slot that is still free.
    fn claim(&mut self, free: &mut FreeSlots, size: u32) -> u32 {
        loop {
            let slot = self.next;
            // Both are below `size`, so one subtraction does for the remainder.
            self.next += self.skip;
            if self.next >= size {
                self.next -= size;
            }
            if free.claim(slot) {
                return slot;
            }
        }
    }
}

/// One bit per slot: small enough to stay in the cache, where most of the claims look in vain.
struct FreeSlots(Vec<u64>);

impl FreeSlots {
    fn new(size: u32) -> Self {
        Self(vec![u64::MAX; size.div_ceil(u64::BITS) as usize])
    }

    /// Whether the slot was free; it no longer is.
    fn claim(&mut self, slot: u32) -> bool {
        let word = &mut self.0[(slot / u64::BITS) as usize];
        let bit = 1 << (slot % u64::BITS);
        let free = *word & bit != 0;
        // Only then: a store per look would hold up the next look at the same word.
        if free {
            *word ^= bit;
        }
        free
    }
}

// Arbitrary; but a gateway with others fills other tables.
const OFFSET: u64 = 0x6f66_6673_6574_0001;
const SKIP: u64 = 0x736b_6970_0000_0002;
const PHASE: u64 = 0x7068_6173_6500_0003;

/// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit of the result
/// depends on every bit of the input.
const fn hash(identity: u64, salt: u64) -> u64 {
    let mut z = (identity ^ salt).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn is_prime(number: u32) -> bool {
    // Also keeps the sum in `Walk::claim` from wrapping.
    (2..1 << 31).contains(&number)
        && (2..)
            .take_while(|divisor| divisor * divisor <= number)
            .all(|d| !number.is_multiple_of(d))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::schedule::fixtures::{count, members};

    const SMALL: usize = 2_039;

    fn counts(table: &[u32]) -> HashMap<u32, usize> {
        let mut counts = HashMap::new();
        for &id in table {
            *counts.entry(id).or_default() += 1;
        }
        counts
    }

    /// Slots that changed hands although the member that had them is still there.
    fn needlessly_moved(before: &[u32], after: &[u32], gone: impl Fn(u32) -> bool) -> usize {
        before.iter().zip(after).filter(|&(&old, &new)| old != new && !gone(old)).count()
    }

    #[test]
    fn given_no_member_with_weight_when_filled_then_the_table_is_empty() {
        assert!(table(&[], SMALL).is_empty(), "no members");
        assert!(table(&members([0, 0]), SMALL).is_empty(), "no weight");
    }

    #[test]
    #[should_panic(expected = "a prime below 2^31")]
    fn given_a_size_that_is_not_prime_when_filled_then_it_panics() {
        let _ = table(&members([1]), 65_536);
    }

    #[test]
    fn given_any_number_of_backends_when_sized_then_the_table_is_prime_and_large_enough() {
        for backends in [0, 1, 16, 17, 64, 65, 1024, 1025, 10_485] {
            let size = size_for(backends);
            assert!(is_prime(u32::try_from(size).unwrap()), "{size}");
            assert!(size >= 100 * backends, "{size} slots for {backends}");
        }
    }

    /// The list is an interface between gateways: one that runs another version must agree.
    #[test]
    fn given_known_members_when_filled_then_the_table_is_the_one_of_every_version() {
        let expected = [
            2, 1, 1, 1, 1, 1, 1, 3, 2, 2, 1, 1, 1, 2, 1, 1, 1, 1, 2, 3, 3, 2, 2, 3, 1, 3, 2, 2, 2,
            1, 1,
        ];
        assert_eq!(table(&members([3, 2, 1]), 31), expected);
    }

    /// Section 3.4: "we choose M to be larger than 100 x N to ensure at most a 1% difference in
    /// hash space assigned to backends".
    #[test]
    fn given_the_sizes_in_use_when_weights_are_equal_then_shares_differ_by_one_slot() {
        for backends in [3, 16, 17, 64, 65, 1024] {
            let size = size_for(backends);
            let counts = counts(&table(&members(vec![100; backends]), size));
            let (low, high) = (*counts.values().min().unwrap(), *counts.values().max().unwrap());
            assert_eq!(counts.len(), backends);
            assert!(high - low <= 1, "{backends}: {low}..={high} slots");
            assert!((high - low) * 100 <= low, "{backends}: {low}..={high} differ by over 1 %");
        }
    }

    /// Section 5.3, figure 11: with 1000 backends and 65 537 slots Maglev is nearly perfect, where
    /// Karger's ring needs backends that are 29.7 % and rendezvous hashing 49.5 % over-provisioned.
    #[test]
    fn given_the_papers_setup_when_filled_then_hardly_any_over_provisioning_is_needed() {
        let counts = counts(&table(&members(vec![1; 1000]), 65_537));
        let busiest = *counts.values().max().unwrap() as f64;
        let over = busiest / (65_537.0 / 1000.0) - 1.0;
        assert!(over < 0.016, "the busiest backend has {:.2} % too much", over * 100.0);
    }

    /// Section 5.3, figure 12: 1000 backends, of which a few fail at once; the larger the table,
    /// the smaller the part of it that changes for no reason.
    #[test]
    fn given_the_papers_setup_when_backends_fail_then_few_other_slots_move() {
        let all = members(vec![1; 1000]);
        let moved = |failed: u32, size: usize| {
            let gone = |id| id <= failed;
            let left: Vec<_> = all.iter().copied().filter(|member| !gone(member.id)).collect();
            let moved = needlessly_moved(&table(&all, size), &table(&left, size), gone);
            moved as f64 / size as f64
        };
        for (failed, small, large) in [(1, 0.01, 0.005), (5, 0.025, 0.01), (20, 0.04, 0.015)] {
            let (in_small, in_large) = (moved(failed, 65_537), moved(failed, 655_373));
            assert!(in_small < small, "{failed} failed: {in_small:.4} of 65 537 slots moved");
            assert!(in_large < large, "{failed} failed: {in_large:.4} of 655 373 slots moved");
        }
    }

    /// Of a hundred, one more or one less moves the one part in a hundred that it has to, and hardly more.
    #[test]
    fn given_a_hundred_backends_when_one_comes_or_goes_then_one_in_a_hundred_choices_moves() {
        let all = members([100; 101]);
        let size = size_for(100);
        assert_eq!(size, size_for(99), "one table for both");
        assert_eq!(size, size_for(101), "one table for both");
        let (with, without) = (table(&all, size), table(&all[..100], size));
        let moved = with.iter().zip(&without).filter(|(with, without)| with != without).count();
        let part = moved as f64 / size as f64;
        assert!(part <= 1.0 / 100.0 + 0.01, "{part:.4} of the choices moved");
        assert!(part >= 1.0 / 101.0 - 0.001, "the new one has its share: {part:.4}");
    }

    #[test]
    fn given_mixed_weights_when_the_heaviest_leaves_then_few_other_slots_move() {
        let all = members([100, 50, 50, 30, 30, 10, 10, 1]);
        let size = size_for(all.len());
        let (before, after) = (table(&all, size), table(&all[1..], size));
        let moved = needlessly_moved(&before, &after, |id| id == 1) as f64 / size as f64;
        assert!(moved < 0.02, "{moved:.4} of the slots moved");
    }

    #[test]
    fn given_equal_weights_when_one_is_halved_then_few_other_slots_move() {
        let before = members([100; 10]);
        let mut after = before.clone();
        after[3].weight = 50;
        let size = size_for(before.len());
        let moved = needlessly_moved(&table(&before, size), &table(&after, size), |id| id == 4)
            as f64
            / size as f64;
        assert!(moved < 0.02, "{moved:.4} of the slots moved");
    }

    #[test]
    fn given_one_heavy_among_many_light_when_filled_then_its_share_is_its_weight() {
        let mut weights = vec![1; 1000];
        weights[0] = 100;
        let slots = table(&members(weights), 131_071);
        let ideal = 131_071.0 * 100.0 / 1099.0;
        let share = count(&slots, 1) as f64;
        assert!((share - ideal).abs() <= 4.0, "{share} slots, ideally {ideal:.1}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn given_any_weights_when_filled_then_every_share_is_as_weighted(
            weights in proptest::collection::vec(0_u32..=100, 1..20),
        ) {
            let members = members(weights);
            let total: u32 = members.iter().map(|member| member.weight).sum();
            prop_assume!(total > 0);
            let slots = table(&members, SMALL);
            prop_assert_eq!(slots.len(), SMALL);
            for Member { id, weight, .. } in members {
                let ideal = f64::from(weight) * SMALL as f64 / f64::from(total);
                let share = count(&slots, id) as f64;
                prop_assert!((share - ideal).abs() <= 2.0, "{}: {} for {}", id, share, ideal);
                prop_assert!(weight > 0 || share == 0.0, "{} has no weight", id);
            }
        }

        #[test]
        fn given_any_weights_when_turns_are_sorted_then_they_are_those_that_are_looked_for(
            weights in proptest::collection::vec(1_u32..=100, 1..20),
        ) {
            let members = members(weights);
            let mut taken = Vec::new();
            take_turns(&members, SMALL as u32, |member| taken.push(member));
            prop_assert_eq!(taken, sorted_turns(&members, SMALL as u32));
        }

        #[test]
        fn given_the_same_members_when_their_order_differs_then_the_table_does_not(
            (ordered, shuffled) in proptest::collection::vec(0_u32..=100, 1..20)
                .prop_map(members)
                .prop_flat_map(|members| (Just(members.clone()), Just(members).prop_shuffle())),
        ) {
            prop_assert_eq!(table(&ordered, SMALL), table(&shuffled, SMALL));
        }

        #[test]
        fn given_other_ids_when_filled_then_the_same_backends_have_the_same_slots(
            weights in proptest::collection::vec(0_u32..=100, 1..20),
        ) {
            let here = members(weights);
            let there: Vec<_> =
                here.iter().map(|member| Member { id: 1000 - member.id, ..*member }).collect();
            let slots: Vec<_> = table(&there, SMALL).iter().map(|id| 1000 - id).collect();
            prop_assert_eq!(table(&here, SMALL), slots);
        }
    }
}
