//! What the packet path reads and writes in shared memory, field by field, and what guards what.

use slb_common::abi::{
    AclCacheEntry, Address, BUCKET_FLOWS, Bucket, ClientNextHop, ConnState, Counter, EPOCH_LOCKED,
    FILTER_HASHES, FILTER_PER_BYTE, Filter, Flow, FlowKind, Fragment, INDEX_SLOTS, Index, Limits,
    MAX_INGRESS, Mode, NETWORK_BYTES, NextHop, Policers, Record, Seed, Settings, SourcePolicer,
    Sticky, SynAnswers, TAG_LOCKED, Traffic,
};

use crate::cell::{Guarded, SharedCell, shared_fields};

shared_fields! {
    Bucket { flows: [Flow; BUCKET_FLOWS] }
    Flow {
        tag: u32,
        expires: u32,
        src: Address,
        dst: Address,
        sport: u16,
        dport: u16,
        backend: u32,
        proto: u8,
        kind: u8,
        state: u8 as ConnState,
        proxy: u8,
        port: u16,
        source: u16,
        peer: u32,
        sequence: u32,
    }
    ClientNextHop {
        addr: Address,
        vip: Address,
        hop: NextHop,
        epoch: u32,
        flags: u32,
        mtu: u32,
    }
    AclCacheEntry { addr: Address, acl: u32, epoch: u32, is_listed: u32, write: u32 }
    Policers { flows: u64, forward: u64, reply: u64 }
    SourcePolicer { paid: u64 }
    Limits {
        flow_ns: u64,
        flow_burst: u64,
        source_ns: u64,
        source_burst: u64,
        byte_ns: u64,
        byte_burst: u64,
    }
    Fragment {
        src: Address,
        dst: Address,
        hop: NextHop,
        hash: u64,
        backend: u32,
        mode: Mode,
        kind: u32,
        mtu: u32,
        expires: u32,
        id: u32,
        from: Address,
        interfaces: u64,
    }
    Sticky { backend: u32, expires: u32 }
    Filter {
        bypass_until: u32,
        adopted_until: u32,
        roles: [u8; FILTER_HASHES / FILTER_PER_BYTE],
        elsewhere: [u8; MAX_INGRESS * NETWORK_BYTES],
    }
    Settings {
        route_epoch: u32,
        buckets: u32,
        opening_jiffies: u32,
        closing_jiffies: u32,
        fragment_jiffies: u32,
        no_listener: u32,
        generic: u32,
        veth: u32,
        acl_epoch: u32,
        tunnel_v4: Address,
        tunnel_v6: Address,
    }
    Counter { packets: u64, bytes: u64 }
    SynAnswers { accepted: u64, refused: u64 }
    Traffic { flows: u64, packets: u64, bytes: u64, reply_packets: u64, reply_bytes: u64 }
}

impl SharedCell<Settings> {
    /// By reference: it is written once, before the first packet, and later only by its own bytes.
    #[inline(always)]
    pub const fn table_seed(self) -> &'static Seed {
        // SAFETY: a field of the settings, which stay where they are, and does not change.
        unsafe { &(*self.as_ptr()).table_seed }
    }
}

impl<V: 'static, const RECORDS: usize> SharedCell<Index<V, RECORDS>> {
    /// Which records endpoints have.
    #[inline(always)]
    pub const fn places(self) -> SharedCell<[u32; INDEX_SLOTS]> {
        // SAFETY: a field is a part of its value.
        unsafe { SharedCell::part_of(&raw mut (*self.as_ptr()).places) }
    }

    /// A record that a place has named: it is not written before all programs that have read the place are done.
    #[inline(always)]
    pub const fn record(self, number: u32) -> &'static Record<V> {
        const { assert!(RECORDS.is_power_of_two()) };
        // Not by comparison: the verifier would lose track.
        let number = number as usize % RECORDS;
        // SAFETY: inside of the array, and not written for now.
        unsafe { &(*self.as_ptr()).records[number] }
    }
}

impl SharedCell<Flow> {
    /// Whether it is of this kind.
    #[inline(always)]
    pub fn is(self, kind: FlowKind) -> bool {
        u32::from(self.kind().load()) == kind as u32
    }
}

/// An entry of the flow table is guarded by its tag.
impl Guarded for Flow {
    #[inline(always)]
    fn guard(cell: SharedCell<Self>) -> SharedCell<u32> {
        cell.tag()
    }

    #[inline(always)]
    fn claimed(_: u32) -> u32 {
        TAG_LOCKED
    }

    #[inline(always)]
    fn is_claimed(guard: u32) -> bool {
        guard == TAG_LOCKED
    }
}

/// A next hop is guarded by its epoch.
impl Guarded for ClientNextHop {
    #[inline(always)]
    fn guard(cell: SharedCell<Self>) -> SharedCell<u32> {
        cell.epoch()
    }

    #[inline(always)]
    fn claimed(_: u32) -> u32 {
        EPOCH_LOCKED
    }

    #[inline(always)]
    fn is_claimed(guard: u32) -> bool {
        guard == EPOCH_LOCKED
    }
}

/// What an access list has said is guarded by a counter, which is odd while there is a write.
impl Guarded for AclCacheEntry {
    #[inline(always)]
    fn guard(cell: SharedCell<Self>) -> SharedCell<u32> {
        cell.write()
    }

    #[inline(always)]
    fn claimed(before: u32) -> u32 {
        before.wrapping_add(1)
    }

    #[inline(always)]
    fn is_claimed(guard: u32) -> bool {
        guard & 1 != 0
    }
}
