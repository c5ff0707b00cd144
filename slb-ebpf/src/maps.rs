//! Every map: who writes it, who reads it, what a missing entry means. `docs/maps.md` shows dumps.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, lpm_trie::Key},
    macros::btf_map,
};
use slb_common::{
    abi::{
        self, AclCacheEntry, Address, Backend, Bucket, Chunk, ClientNextHop, Counter,
        DEFAULT_BUCKETS, DEFAULT_CHUNKS, Endpoint, FILTER_PER_BYTE, Filter, Fragment, FragmentKey,
        INDEX_MANY, INDEX_NONE, Index, Interface, Keys, Limits, Listed, Listener, ListenerIndex,
        MAX_ACL_CACHE, MAX_BACKENDS, MAX_ENDPOINTS, MAX_FRAGMENTS, MAX_INTERFACES, MAX_LISTENERS,
        MAX_NEXT_HOPS, MAX_PREFIXES, MAX_QUIC, MAX_SOURCES, MAX_STICKY, NatTuple, Policers,
        QuicKey, ROLE_BACKEND, ROLE_VIP, RevNat, RevNatIndex, Roles, Scratch, Settings, Sticky,
        StickyKey, SynAnswers, Traffic,
    },
    hash,
    programs::Program,
    proxy_protocol::{Head, Options, Words},
    verdict::MAX_VERDICTS,
};

/// Not preallocated: a replaced value lives on until the packets that have looked it up are done.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
/// Begins at a page, so that elements of 64 bytes are cache lines, and the agent can look into it
/// without a system call per element.
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// Written by the agent. Missing: no listener there.
#[btf_map]
pub static SLB_LISTENERS: HashMap<Endpoint, Listener, MAX_LISTENERS, NO_PREALLOC> = HashMap::new();

/// Written by the agent: spares the program the look-up in `SLB_LISTENERS`.
#[btf_map]
pub static SLB_LISTENER_INDEX: Array<ListenerIndex, 1, MMAPABLE> = Array::new();

/// Written by the agent: spares the program the look-up in `SLB_REVNAT`.
#[btf_map]
pub static SLB_REVNAT_INDEX: Array<RevNatIndex, 1, MMAPABLE> = Array::new();

/// Written by the agent; only chunks that no listener refers to are written.
#[btf_map]
pub static SLB_SLOTS: Array<Chunk, DEFAULT_CHUNKS> = Array::new();

/// Written by the program: how many flows each listener has given out in turn.
#[btf_map]
pub static SLB_RR_CURSORS: Array<u64, MAX_LISTENERS> = Array::new();

/// Written by the agent.
#[btf_map]
pub static SLB_BACKENDS: Array<Backend, MAX_BACKENDS, MMAPABLE> = Array::new();

/// Written by the agent.
#[btf_map]
pub static SLB_FILTER: Array<Filter, 1, MMAPABLE> = Array::new();

/// Written by the agent. Missing: the address means nothing to us.
#[btf_map]
pub static SLB_ADDRESSES: HashMap<Address, Roles, MAX_ENDPOINTS, NO_PREALLOC> = HashMap::new();

/// Written by the agent. Missing: nobody balances to that address and port.
#[btf_map]
pub static SLB_REVNAT: HashMap<Endpoint, RevNat, MAX_ENDPOINTS, NO_PREALLOC> = HashMap::new();

/// Written by the agent. Missing: XDP cannot send there, the kernel has to.
#[btf_map]
pub static SLB_INTERFACES: HashMap<u32, Interface, MAX_INTERFACES, NO_PREALLOC> = HashMap::new();

/// Written by the agent.
#[btf_map]
pub static SLB_SETTINGS: Array<Settings, 1> = Array::new();

/// Written by the program: the ways to clients, one per [`hash::address`].
#[btf_map]
pub static SLB_NEXT_HOPS: Array<ClientNextHop, MAX_NEXT_HOPS> = Array::new();

/// Written by the program; the agent frees places.
#[btf_map]
pub static SLB_FLOWS: Array<Bucket, DEFAULT_BUCKETS, MMAPABLE> = Array::new();

/// Written by the program, indexed like `SLB_BACKENDS`: when somebody last talked to the backend's
/// address and port directly, in jiffies; 0: never. The last place is all backends'.
#[btf_map]
pub static SLB_BYPASS: Array<u32, MAX_BACKENDS> = Array::new();

/// Written by the program; the index is [`slb_common::verdict::Verdict`].
#[btf_map]
pub static SLB_VERDICTS: PerCpuArray<Counter, MAX_VERDICTS> = PerCpuArray::new();

/// Written by the program; indexed like `SLB_BACKENDS`.
#[btf_map]
pub static SLB_TRAFFIC: PerCpuArray<Traffic, MAX_BACKENDS> = PerCpuArray::new();

/// Written by the program and corrected by the agent, indexed like `SLB_BACKENDS`: entries of flows that have not
/// ended.
#[btf_map]
pub static SLB_ACTIVE: Array<u64, MAX_BACKENDS, MMAPABLE> = Array::new();

/// Written by the program, indexed like `SLB_BACKENDS`: what passive health checks know.
#[btf_map]
pub static SLB_PASSIVE_HC: PerCpuArray<SynAnswers, MAX_BACKENDS> = PerCpuArray::new();

/// Written by the program: which backend a client's flows are kept with.
#[btf_map]
pub static SLB_STICKY: LruHashMap<StickyKey, Sticky, MAX_STICKY> = LruHashMap::new();

/// Written by the agent: the prefixes of all access lists. A list is never changed: another takes its place.
#[btf_map]
pub static SLB_ACL: LpmTrie<Listed, u32, MAX_PREFIXES> = LpmTrie::new();

/// Written by the program: what it has found in `SLB_ACL`, one per hash of list and client.
#[btf_map]
pub static SLB_ACL_CACHE: Array<AclCacheEntry, MAX_ACL_CACHE> = Array::new();

/// Written by the agent. Missing: no backend of the listener has that server ID.
#[btf_map]
pub static SLB_QUIC: HashMap<QuicKey, u32, MAX_QUIC, NO_PREALLOC> = HashMap::new();

/// Written by the agent; the index is [`slb_common::abi::Listener::id`].
#[btf_map]
pub static SLB_LIMITS: Array<Limits, MAX_LISTENERS> = Array::new();

/// Written by the program; indexed like `SLB_LIMITS`.
#[btf_map]
pub static SLB_POLICERS: Array<Policers, MAX_LISTENERS> = Array::new();

/// Written by the agent: source addresses towards backends. Number 0 is none.
#[btf_map]
pub static SLB_SOURCES: Array<Address, MAX_SOURCES> = Array::new();

/// Written by the program: where the first fragments of packets went.
#[btf_map]
pub static SLB_FRAGMENTS: LruHashMap<FragmentKey, Fragment, MAX_FRAGMENTS> = LruHashMap::new();

/// Written by the agent: the programs behind the first.
#[btf_map]
pub static SLB_PROGRAMS: ProgramArray<{ Program::ALL.len() }> = ProgramArray::new();

/// Written and read by the program.
#[btf_map]
pub static SLB_SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// This CPU's place for the packet, and for what one program tells the next. For [`crate::ctx::PacketCtx`] only:
/// there is one.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: this CPU's own, and a program is not interrupted by another on its CPU.
    SLB_SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// This CPU's place for keys. For one function at a time.
#[inline(always)]
pub fn keys() -> Option<&'static mut Keys> {
    // SAFETY: as above.
    SLB_SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut (*scratch).keys })
}

/// This CPU's place for the ends of a packet. For [`crate::full_nat`].
#[inline(always)]
pub fn ends() -> Option<&'static mut NatTuple> {
    // SAFETY: as above.
    SLB_SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut (*scratch).keys.ends })
}

/// This CPU's place for what is put into a packet, for what stands before it, and for its options. For
/// [`crate::proxy_protocol`].
#[inline(always)]
pub fn proxy_buffers() -> Option<(&'static mut Words, &'static mut Head, &'static mut Options)> {
    let scratch = SLB_SCRATCH.get_ptr_mut(0)?;
    // SAFETY: as above.
    unsafe { Some((&mut (*scratch).words, &mut (*scratch).head, &mut (*scratch).options)) }
}

/// A backend by its index.
#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend> {
    SLB_BACKENDS.get(id)
}

/// What the addresses of a packet may be to us.
pub struct Known {
    /// Roles of the source.
    pub from: u32,
    /// Roles of the destination.
    pub to: u32,
    /// [`Filter::bypass_until`].
    pub bypass_until: u32,
}

/// What the addresses of a packet may be to us.
#[inline(always)]
pub fn filter(src: &Address, dst: &Address) -> Known {
    let Some(filter) = SLB_FILTER.get(0) else { return Known { from: 0, to: 0, bypass_until: 0 } };
    let roles = |addr: &Address| {
        let hash = hash::filter(*addr);
        let byte = u32::from(filter.roles[hash / FILTER_PER_BYTE]);
        byte >> (2 * (hash % FILTER_PER_BYTE)) & (ROLE_VIP | ROLE_BACKEND)
    };
    Known { from: roles(src), to: roles(dst), bypass_until: filter.bypass_until }
}

/// [`Filter::bypass_until`].
#[inline(always)]
pub fn bypass_until() -> u32 {
    SLB_FILTER.get(0).map_or(0, |filter| filter.bypass_until)
}

/// What an index has of an endpoint: its record's value, or nothing, if it knows for certain.
#[inline(always)]
fn indexed<V, const RECORDS: usize>(
    index: Option<&'static Index<V, RECORDS>>,
    at: &Endpoint,
) -> Option<Option<&'static V>> {
    let index = index?;
    // SAFETY: of the map; read once, as the agent may replace it meanwhile.
    let word = unsafe { ptr::read_volatile(&raw const index.places[hash::endpoint(at)]) };
    match word {
        INDEX_NONE => return Some(None),
        INDEX_MANY => return None,
        _ => {}
    }
    // Not by comparison: the verifier would lose track.
    let record = |number: u32| &index.records[number as usize % RECORDS];
    let (first, second) = abi::index_records(word);
    let first = record(first);
    if first.at.same(at) {
        return Some(Some(&first.value));
    }
    if second == 0 {
        return Some(None);
    }
    let second = record(second);
    Some(second.at.same(at).then_some(&second.value))
}

/// The listener of an endpoint.
#[inline(always)]
pub fn listener(at: &Endpoint) -> Option<&'static Listener> {
    match indexed(SLB_LISTENER_INDEX.get(0), at) {
        Some(known) => known,
        // A copy: the original may be in registers.
        // SAFETY: a replaced value lives on until the program ends.
        None => unsafe { SLB_LISTENERS.get(*at) },
    }
}

/// Whom a backend's address and port answer for.
#[inline(always)]
pub fn revnat(at: &Endpoint) -> Option<&'static RevNat> {
    match indexed(SLB_REVNAT_INDEX.get(0), at) {
        Some(known) => known,
        // SAFETY: as above.
        None => unsafe { SLB_REVNAT.get(*at) },
    }
}

/// What an address is to us.
#[inline(always)]
pub fn roles(addr: &Address) -> u32 {
    // The kernel is given a pointer to a copy: the original may be in registers.
    let addr = *addr;
    // SAFETY: copied out at once.
    unsafe { SLB_ADDRESSES.get(addr) }.copied().unwrap_or_default().roles
}

/// Whether an address is on an access list.
#[inline(always)]
pub fn is_listed(acl: u32, addr: &Address) -> bool {
    let bits = abi::listed_bits(u128::BITS);
    SLB_ACL.get(&Key::new(bits, abi::listed(acl, *addr))).is_some()
}

/// A source address towards backends.
#[inline(always)]
pub fn source(index: u16) -> Option<&'static Address> {
    SLB_SOURCES.get(index.into())
}

/// The agent's settings.
#[inline(always)]
pub fn settings() -> Settings {
    SLB_SETTINGS.get(0).copied().unwrap_or_default()
}
