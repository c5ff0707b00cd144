//! The hashes that choose slots, buckets and places.
//!
//! Where a sender could gain from a choice, the hash is made with a secret [`Seed`]: each word of a tuple is multiplied by
//! one of the seed's, and the hash is mixed from the sum (multilinear hashing: Lemire and Kaser, "Strongly universal
//! string hashing is fast", 2014). No product waits for another. Without the seed a sender cannot say which of its packets
//! meet.

use crate::abi::{Address, Endpoint, FILTER_HASHES, FlowKey, SEED_WORDS, Scheduler, Seed};

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIER: u64 = 0xff51_afd7_ed55_8ccd;

/// Hash of the 4-tuple and protocol. With a listener's seed the high half chooses the slot ([`choice`]); with the flow
/// table's the low one is what an entry is recognised by.
#[must_use]
#[inline(always)]
pub fn flow(key: &FlowKey, seed: &Seed) -> u64 {
    finish(sum(addresses(key, seed), ports(key), seed))
}

/// The bucket of a flow's entry, of so many.
///
/// Flows of neighbouring ports get neighbouring buckets, eight of which are in one page of memory:
/// a client takes its ports in turn more often than not, and a page that the CPU does not know the
/// address of costs it more than the entry.
#[must_use]
#[inline(always)]
pub fn bucket(key: &FlowKey, seed: &Seed, buckets: u32) -> u32 {
    const NEAR: u64 = 7;
    let near = u64::from(key.sport).wrapping_add(u64::from(key.dport));
    let sum = sum(addresses(key, seed), ports(key) & !(NEAR << 16 | NEAR), seed);
    let first = u64::from(slot(choice(finish(sum)), buckets));
    let in_page = first & !NEAR | first.wrapping_add(near) & NEAR;
    // The last page may be a part of one.
    if in_page < u64::from(buckets) { in_page as u32 } else { first as u32 }
}

#[inline(always)]
const fn ports(key: &FlowKey) -> u64 {
    (key.proto as u64) << 32 | (key.dport as u64) << 16 | key.sport as u64
}

/// Sum of the weighted addresses.
#[inline(always)]
fn addresses(key: &FlowKey, seed: &Seed) -> u64 {
    if key.src.is_v4() {
        let (src, dst) = (key.src.words()[3].to_le(), key.dst.words()[3].to_le());
        return weighted(u64::from(dst) << 32 | u64::from(src), seed, 0);
    }
    let ([src_high, src_low], [dst_high, dst_low]) = (key.src.halves(), key.dst.halves());
    let low = folded(src_low, seed, 0).wrapping_add(folded(dst_low, seed, 1));
    let high = folded(src_high, seed, 2).wrapping_add(folded(dst_high, seed, 3));
    low.wrapping_add(high)
}

/// Half of an IPv6 address. A product's bits depend on none above them, and what differs from host to host may be in the
/// highest only.
#[inline(always)]
fn folded(half: u64, seed: &Seed, place: usize) -> u64 {
    let half = half.to_le();
    weighted(half ^ half >> 32, seed, place)
}

#[inline(always)]
fn weighted(word: u64, seed: &Seed, place: usize) -> u64 {
    word.wrapping_mul(seed.words()[place])
}

#[inline(always)]
fn sum(addresses: u64, ports: u64, seed: &Seed) -> u64 {
    addresses.wrapping_add(weighted(ports, seed, SEED_WORDS - 1))
}

/// The part of a flow's hash that chooses its slot.
#[must_use]
#[inline(always)]
pub const fn choice(hash: u64) -> u32 {
    (hash >> 32) as u32
}

/// What chooses the slot of a flow with this `hash`, [`flow`] with the same seed, by a scheduler that does so by hash.
#[must_use]
#[inline(always)]
pub fn choice_by(scheduler: Scheduler, key: &FlowKey, hash: u64, seed: &Seed) -> u32 {
    if scheduler != Scheduler::SOURCE {
        return choice(hash);
    }
    let [high, low] = key.src.halves();
    choice(finish(folded(low, seed, 0).wrapping_add(folded(high, seed, 2))))
}

/// The same by a QUIC connection ID.
#[must_use]
#[inline(always)]
pub fn choice_of_id(id: u64, seed: &Seed) -> u32 {
    choice(finish(folded(id, seed, 0)))
}

/// Hash of an address, port and protocol: an index into [`crate::abi::Index`].
#[must_use]
#[inline(always)]
pub const fn endpoint(at: &Endpoint) -> usize {
    let [high, low] = at.addr.halves();
    let port = (at.port as u64) << 8 ^ at.proto as u64;
    let mixed = high.to_le().wrapping_mul(SEED) ^ port.wrapping_mul(MULTIPLIER);
    // The last two octets of an IPv4 address are the highest here, and times an odd number they are 65 536 different
    // ones: hosts of one network have different hashes.
    ((low.to_le() ^ mixed).wrapping_mul(SEED) >> 48) as usize
}

/// Hash of an address: an index into `SLB_NEXT_HOPS`.
#[must_use]
#[inline(always)]
pub const fn address(addr: Address) -> usize {
    (mixed(addr) >> 48) as usize
}

/// Hash of a source of flows to the listener with this id, for `SLB_SRC_POLICER`: an IPv4 address, or a network of /64.
#[must_use]
#[inline(always)]
pub fn source(addr: Address, listener: u32, seed: &Seed) -> u32 {
    let [high, low] = addr.halves();
    let low = if addr.is_v4() { low } else { 0 };
    let own = folded(low, seed, 0).wrapping_add(folded(high, seed, 2));
    (finish(own.wrapping_add(weighted(listener.into(), seed, SEED_WORDS - 1))) >> 32) as u32
}

/// The same for `SLB_FILTER`: of [`FILTER_HASHES`].
#[must_use]
#[inline(always)]
pub const fn filter(addr: Address) -> usize {
    (mixed(addr) >> (64 - FILTER_HASHES.ilog2())) as usize
}

/// The network of an address, of 65 536: over IPv4 its first 16 bits, and over IPv6 a hash of its first 32. An index into
/// the part of [`crate::abi::Filter::elsewhere`] that is one place's.
#[must_use]
#[inline(always)]
pub const fn network(addr: Address, is_v4: bool) -> usize {
    let [first, _, _, last] = addr.words();
    let word = if is_v4 { last.to_le() } else { first.to_le() ^ first.to_le() >> 16 };
    (word & 0xffff) as usize
}

/// One multiplication is enough: the high bits of the product depend on all of the word's.
#[inline(always)]
const fn mixed(addr: Address) -> u64 {
    let [high, low] = addr.halves();
    (low.to_le() ^ high.to_le().wrapping_mul(MULTIPLIER)).wrapping_mul(SEED)
}

/// Hash of eight bytes.
#[must_use]
#[inline(always)]
pub const fn bytes(word: u64) -> u64 {
    mix(SEED, word)
}

/// Stable number for an address and port: what a backend is known by in every gateway's tables.
#[must_use]
pub const fn identity(addr: Address, port: u16) -> u64 {
    let [high, low] = addr.halves();
    mix(mix(mix(SEED, high.to_le()), low.to_le()), port as u64)
}

/// One of `slots` by `hash`, each as likely as the others (Lemire, "Fast random integer generation
/// in an interval", 2019).
#[must_use]
#[inline(always)]
pub const fn slot(hash: u32, slots: u32) -> u32 {
    ((hash as u64 * slots as u64) >> 32) as u32
}

/// Makes a hash of a sum, whose low bits depend on the low bits of its words only. One multiplication has to do: the packet
/// waits for it, and what it leaves of an order no sender knows.
#[inline(always)]
const fn finish(sum: u64) -> u64 {
    let hash = (sum ^ sum >> 32).wrapping_mul(MULTIPLIER);
    hash ^ hash >> 32
}

/// Two rounds of multiplication, so that neighbours are far apart.
#[inline(always)]
const fn mix(hash: u64, word: u64) -> u64 {
    let mut hash = (hash ^ word).wrapping_mul(MULTIPLIER);
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 29)
}

#[cfg(test)]
mod tests;
