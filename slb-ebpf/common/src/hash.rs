//! The hash that chooses a slot: the same on every gateway and in the agent.

use crate::abi::{Address, FlowKey};

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const MULTIPLIER: u64 = 0xff51_afd7_ed55_8ccd;

/// Hash of the 4-tuple and protocol.
#[must_use]
#[inline(always)]
pub const fn flow(key: &FlowKey) -> u32 {
    let ports = (key.sport as u64) << 48 | (key.dport as u64) << 32 | key.proto as u64;
    let [src_high, src_low] = key.src.halves();
    let [dst_high, dst_low] = key.dst.halves();
    let mut hash = mix(SEED, ports);
    hash = mix(hash, src_low.to_le());
    hash = mix(hash, dst_low.to_le());
    if !key.src.is_v4() {
        hash = mix(hash, src_high.to_le());
        hash = mix(hash, dst_high.to_le());
    }
    (hash >> 32) as u32
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

/// Two rounds of MurmurHash3's 64-bit finaliser, so that neighbouring ports are far apart.
#[inline(always)]
const fn mix(hash: u64, word: u64) -> u64 {
    let mut hash = (hash ^ word).wrapping_mul(MULTIPLIER);
    hash ^= hash >> 32;
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 29)
}
