//! How the backends of a listener share its new flows.
//!
//! Each scheduler turns weighted [`Member`]s into a list of ids that the XDP program indexes: by a
//! flow's hash ([`maglev`]), or by a running count ([`ring`]). Both lists depend on nothing but the
//! members in any order, so that gateways with the same backends agree on every slot.

pub mod maglev;
pub mod ring;
pub mod transition;

/// One backend, as a scheduler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// What is written into the slots; local to this gateway.
    pub id: u32,
    /// Stable hash of what the backend is (not of how this gateway numbers it), the same on every
    /// gateway; places the member in the list.
    pub identity: u64,
    /// Share relative to the other members'; 0: no slots.
    pub weight: u32,
}

/// The members that have weight, in the order that does not depend on the caller's.
fn weighted(members: &[Member]) -> Vec<Member> {
    let mut members: Vec<_> = members.iter().copied().filter(|member| member.weight > 0).collect();
    members.sort_unstable_by_key(|member| (member.identity, member.id));
    members
}

#[cfg(test)]
mod fixtures {
    use super::Member;

    /// One member per weight, with ids 1, 2, ... and arbitrary identities.
    pub(super) fn members(weights: impl IntoIterator<Item = u32>) -> Vec<Member> {
        (1..)
            .zip(weights)
            .map(|(id, weight)| {
                let identity = u64::from(id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
                Member { id, identity, weight }
            })
            .collect()
    }

    /// How many slots `id` has.
    pub(super) fn count(slots: &[u32], id: u32) -> usize {
        slots.iter().filter(|&&slot| slot == id).count()
    }
}
