//! `SLB_LISTENER_INDEX` and `SLB_REVNAT_INDEX`: look-ups without a call into a hash map.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable};

use super::listener::{Listener, MAX_LISTENERS};
use super::revnat::RevNat;
use crate::net::Endpoint;

/// Hashes in an [`Index`]; a power of two.
pub const INDEX_SLOTS: usize = 65_536;
/// Records in `SLB_LISTENER_INDEX`: twice the listeners, so that nearly all can be replaced at once.
pub const MAX_LISTENER_RECORDS: usize = 2 * MAX_LISTENERS;
/// Records in `SLB_REVNAT_INDEX`: as many as half a word can name. Who finds no room, as more than half of them are
/// replaced at once, is found by the hash map only, until the next change.
pub const MAX_ENDPOINT_RECORDS: usize = 65_536;

/// Value of `SLB_LISTENER_INDEX` and `SLB_REVNAT_INDEX`. All in one: the program computes where a record is,
/// and does not have to ask a second map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable)]
pub struct Index<V, const RECORDS: usize> {
    /// Where an endpoint's record is, by its [`crate::hash::endpoint`]: [`INDEX_NONE`], [`INDEX_MANY`], or in its low
    /// half the number of a record, and in its high half that of another of the same hash, or 0. One word each, so it is
    /// replaced as a whole.
    pub places: [u32; INDEX_SLOTS],
    /// The records. The first belongs to no endpoint.
    pub records: [Record<V>; RECORDS],
}

/// That of listeners.
pub type ListenerIndex = Index<Listener, MAX_LISTENER_RECORDS>;

/// That of backends' addresses and ports.
pub type RevNatIndex = Index<RevNat, MAX_ENDPOINT_RECORDS>;
/// No endpoint has this hash.
pub const INDEX_NONE: u32 = 0;
/// More than two have it, or there was no room for a record: the hash map knows.
pub const INDEX_MANY: u32 = u32::MAX;

/// The word of one or two records; `second` is 0 if there is none.
#[must_use]
#[inline(always)]
pub const fn index_word(first: u32, second: u32) -> u32 {
    second << 16 | first
}

/// The records that a word names, if it does; 0: none.
#[must_use]
#[inline(always)]
pub const fn index_records(word: u32) -> (u32, u32) {
    (word & 0xffff, word >> 16)
}

/// Part of [`Index`]: a copy of an entry of the hash map, which is not written again while a place names it.
/// In cache lines of its own; of a listener's, the second begins with its seed.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable)]
pub struct Record<V> {
    /// The key.
    pub at: Endpoint,
    /// The value.
    pub value: V,
}
const _: () = assert!(size_of::<Record<Listener>>() == 192 && size_of::<Record<RevNat>>() == 64);
const _: () = assert!(offset_of!(Record<Listener>, value.seed) == 64);

const _: () = assert!(
    MAX_LISTENER_RECORDS.is_power_of_two()
        && MAX_LISTENER_RECORDS <= 1 << 16
        && MAX_ENDPOINT_RECORDS.is_power_of_two()
        && MAX_ENDPOINT_RECORDS <= 1 << 16,
    "the program takes the lowest bits of half a word"
);
