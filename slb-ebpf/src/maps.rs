//! Every map: what writes it, what reads it, what a missing entry means. `docs/maps.md` shows dumps.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, lpm_trie::Key},
    macros::btf_map,
};
use slb_common::{
    abi::{
        self, ANY_INTERFACE, AclCacheEntry, Address, Backend, Bucket, Chunk, ClientNextHop,
        Counter, DEFAULT_BUCKETS, DEFAULT_CHUNKS, Endpoint, FILTER_PER_BYTE, Filter, FlowKey,
        Fragment, FragmentKey, INDEX_MANY, INDEX_NONE, Index, Interface, Limits, Listed, Listener,
        ListenerIndex, MAX_ACL_CACHE, MAX_BACKENDS, MAX_ENDPOINTS, MAX_FRAGMENTS, MAX_INGRESS,
        MAX_INTERFACES, MAX_LISTENERS, MAX_MACS, MAX_NEXT_HOPS, MAX_PREFIXES, MAX_QUIC,
        MAX_SOURCE_POLICERS, MAX_SOURCES, MAX_STICKY, MAX_SUBNETS, NETWORK_BYTES, NatTuple, OwnMac,
        Policers, QuicKey, RevNat, RevNatIndex, Roles, RouteQuery, Scratch, Settings,
        SourcePolicer, Sticky, StickyKey, Subnet, SynAnswers, TailCallArgs, Traffic, VLAN_WORDS,
    },
    hash,
    packet::Packet,
    programs::Program,
    proxy_protocol::{Head, Options, Words},
    verdict::MAX_VERDICTS,
};

use crate::cell::{Elements as _, SharedCell};

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

/// Written by the agent. Missing: no listener has a backend at that address and port.
#[btf_map]
pub static SLB_REVNAT: HashMap<Endpoint, RevNat, MAX_ENDPOINTS, NO_PREALLOC> = HashMap::new();

/// Written by the agent. Missing: XDP cannot send there, the kernel has to.
#[btf_map]
pub static SLB_INTERFACES: HashMap<u32, Interface, MAX_INTERFACES, NO_PREALLOC> = HashMap::new();

/// Written by the agent: spares the program the look-up in `SLB_INTERFACES`. One interface of those whose index has the
/// same lowest bits.
#[btf_map]
pub static SLB_INGRESS: Array<Interface, MAX_INGRESS> = Array::new();

/// Written by the agent. Missing: the interface has no such MAC address.
#[btf_map]
pub static SLB_MACS: HashMap<OwnMac, u32, MAX_MACS, NO_PREALLOC> = HashMap::new();

/// Written by the agent: the interfaces that a connected subnet is behind.
#[btf_map]
pub static SLB_SUBNETS: LpmTrie<Subnet, u64, MAX_SUBNETS> = LpmTrie::new();

/// Written by the agent: a bit for each VLAN that is not served, 64 in an element.
#[btf_map]
pub static SLB_VLANS: Array<u64, VLAN_WORDS> = Array::new();

/// Written by the agent.
#[btf_map]
pub static SLB_SETTINGS: Array<Settings, 1> = Array::new();

/// Written by the program: the ways to clients, one per [`hash::address`].
#[btf_map]
pub static SLB_NEXT_HOPS: Array<ClientNextHop, MAX_NEXT_HOPS> = Array::new();

/// Written by the program; the agent frees places.
#[btf_map]
pub static SLB_FLOWS: Array<Bucket, DEFAULT_BUCKETS, MMAPABLE> = Array::new();

/// Written by the program, indexed like `SLB_BACKENDS`: until when, in jiffies, flows of the backend have to be looked for
/// in the flow table, because it has answered a client that talks to its address and port directly; 0: it never has.
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

/// Written by the program: what sources have taken of listeners, by [`hash::source`].
#[btf_map]
pub static SLB_SRC_POLICER: Array<SourcePolicer, MAX_SOURCE_POLICERS> = Array::new();

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

macro_rules! parts_of_scratch {
    ($($(#[doc = $doc:literal])+ $name:ident: $($($field:ident).+ => $type:ty),+;)+) => {$(
        $(#[doc = $doc])+
        #[allow(unused_parens, reason = "one part is no tuple")]
        #[inline(always)]
        pub fn $name() -> Option<($(&'static mut $type),+)> {
            let scratch = SLB_SCRATCH.get_ptr_mut(0)?;
            // SAFETY: this CPU's own, a program is not interrupted by another on its CPU, and no two of these
            // functions give the same part, of which each has one user at a time.
            unsafe { Some(($(&mut (*scratch).$($field).+),+)) }
        }
    )+};
}
// What the stack has no room for, of this CPU. Each part is for one function at a time.
parts_of_scratch! {
    /// The packet, and what one program tells the next: for [`crate::ctx::PacketCtx`], of which there is one.
    handed_over: packet => Packet, args => TailCallArgs;
    /// What a backend would answer with.
    reply_key: keys.reply => FlowKey;
    /// What a client would send, and where it goes.
    client_key: keys.forward => FlowKey, keys.to => Endpoint;
    /// The key of a packet in fragments, and where its first one goes: for [`crate::fragments`] and
    /// [`crate::lookups`].
    fragment: keys.fragments => FragmentKey, keys.fragment => Fragment;
    /// What a packet's ends are replaced by: for [`crate::full_nat`] and [`crate::icmp_nat64`].
    ends: keys.ends => NatTuple;
    /// A client that is kept with its backend: for [`crate::lookups`].
    sticky_key: keys.sticky => StickyKey;
    /// A question to the kernel's routing tables: for [`crate::neigh`].
    route_query: keys.route => RouteQuery;
    /// What is put into a packet, what stands before it, and its options: for [`crate::proxy_protocol`].
    proxy_buffers: words => Words, head => Head, options => Options;
    /// When this CPU last sent an ICMP error, and how many since: for [`crate::respond`].
    sent_errors: errors_at => u32, errors => u32;
}

/// A backend by its index: a reference, see [`crate::cell`].
#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend> {
    SLB_BACKENDS.get(id)
}

/// What the addresses of a packet may be to us.
#[derive(Default)]
pub struct Known {
    /// Roles of the source.
    pub from: Roles,
    /// Roles of the destination.
    pub to: Roles,
    /// [`Filter::bypass_until`].
    pub bypass_until: u32,
    filter: Option<SharedCell<Filter>>,
}

/// What the addresses of a packet may be to us.
#[inline(always)]
pub fn filter(src: &Address, dst: &Address) -> Known {
    let Some(filter) = SLB_FILTER.cell(0) else { return Known::default() };
    let roles = |addr: &Address| {
        let hash = hash::filter(*addr);
        let byte = u32::from(filter.roles().at(hash / FILTER_PER_BYTE).load());
        Roles::from_bits_retain(byte >> (2 * (hash % FILTER_PER_BYTE))) & Roles::FILTERED
    };
    let bypass_until = filter.bypass_until().load();
    Known { from: roles(src), to: roles(dst), bypass_until, filter: Some(filter) }
}

impl Known {
    /// Whether a subnet in the network of an address is not behind an interface.
    #[inline(always)]
    pub fn may_be_elsewhere(&self, ifindex: u32, addr: &Address, is_v4: bool) -> bool {
        let Some(filter) = self.filter else { return false };
        let network = hash::network(*addr, is_v4);
        let byte = abi::ingress_place(ifindex) * NETWORK_BYTES + network / 8;
        filter.elsewhere().at(byte).load() >> (network % 8) & 1 != 0
    }
}

/// [`Filter::bypass_until`].
#[inline(always)]
pub fn bypass_until() -> u32 {
    SLB_FILTER.cell(0).map_or(0, |filter| filter.bypass_until().load())
}

/// [`Filter::adopted_until`].
#[inline(always)]
pub fn adopted_until() -> u32 {
    SLB_FILTER.cell(0).map_or(0, |filter| filter.adopted_until().load())
}

/// What an index has of an endpoint: its record's value, or nothing, if it knows for certain.
#[inline(always)]
fn indexed<V: 'static, const RECORDS: usize>(
    index: Option<SharedCell<Index<V, RECORDS>>>,
    at: &Endpoint,
) -> Option<Option<&'static V>> {
    let index = index?;
    let word = index.places().at(hash::endpoint(at)).load();
    match word {
        INDEX_NONE => return Some(None),
        INDEX_MANY => return None,
        _ => {}
    }
    let (first, second) = abi::index_records(word);
    let first = index.record(first);
    if first.at.same(at) {
        return Some(Some(&first.value));
    }
    if second == 0 {
        return Some(None);
    }
    let second = index.record(second);
    Some(second.at.same(at).then_some(&second.value))
}

/// An entry that the agent has written. It is never written again, but replaced by another.
#[inline(always)]
fn entry<K, V, const LEN: usize>(
    map: &'static HashMap<K, V, LEN, NO_PREALLOC>,
    key: &K,
) -> Option<&'static V> {
    // SAFETY: a replaced or removed value of such a map lives on until the program ends.
    unsafe { map.get(key) }
}

/// The listener of an endpoint.
#[inline(always)]
pub fn listener(at: &Endpoint) -> Option<&'static Listener> {
    match indexed(SLB_LISTENER_INDEX.cell(0), at) {
        Some(known) => known,
        // A copy: the original may be in registers.
        None => listener_entry(&{ *at }),
    }
}

/// The same, not by the index: takes less stack.
#[inline(always)]
pub fn listener_entry(at: &Endpoint) -> Option<&'static Listener> {
    entry(&SLB_LISTENERS, at)
}

/// Whom a backend's address and port answer for.
#[inline(always)]
pub fn revnat(at: &Endpoint) -> Option<&'static RevNat> {
    match indexed(SLB_REVNAT_INDEX.cell(0), at) {
        Some(known) => known,
        // As above.
        None => revnat_entry(&{ *at }),
    }
}

/// The same, not by the index: takes less stack.
#[inline(always)]
pub fn revnat_entry(at: &Endpoint) -> Option<&'static RevNat> {
    entry(&SLB_REVNAT, at)
}

/// What an address is to us.
#[inline(always)]
pub fn roles(addr: &Address) -> Roles {
    // The kernel is given a pointer to a copy: the original may be in registers.
    entry(&SLB_ADDRESSES, &{ *addr }).copied().unwrap_or_default()
}

/// An interface, if it is the one of its place in `SLB_INGRESS`.
#[inline(always)]
pub fn near(ifindex: u32) -> Option<&'static Interface> {
    SLB_INGRESS.get(abi::ingress_place(ifindex) as u32).filter(|near| near.ifindex == ifindex)
}

/// An interface.
#[inline(always)]
pub fn interface(ifindex: u32) -> Option<&'static Interface> {
    near(ifindex).or_else(|| entry(&SLB_INTERFACES, &ifindex))
}

/// The set of an interface: every one, if it has no number.
#[inline(always)]
pub fn interface_set(ifindex: u32) -> u64 {
    interface(ifindex).map_or(ANY_INTERFACE, Interface::set)
}

/// The interfaces that the subnet of an address is behind, if it is on one.
#[inline(always)]
pub fn subnet(addr: &Address) -> Option<u64> {
    SLB_SUBNETS.get(&Key::new(u128::BITS, abi::subnet(*addr))).copied()
}

/// Whether a MAC address is one of this host's.
#[inline(always)]
pub fn has_mac(mac: &OwnMac) -> bool {
    entry(&SLB_MACS, mac).is_some()
}

/// Whether packets of a VLAN are served.
#[inline(always)]
pub fn serves_vlan(id: u32) -> bool {
    let word = SLB_VLANS.cell(id / 64).map_or(0, SharedCell::load);
    word >> (id % 64) & 1 == 0
}

/// Whether packets may be sent out of an interface.
#[inline(always)]
pub fn can_redirect(ifindex: u32) -> bool {
    // Not by `interface`: a look-up that is rare takes less stack.
    entry(&SLB_INTERFACES, &ifindex).is_some_and(|interface| interface.redirect != 0)
}

/// The backend of a listener that has issued QUIC connection IDs with this server ID.
#[inline(always)]
pub fn quic_backend(listener: u32, server: u32) -> Option<u32> {
    entry(&SLB_QUIC, &QuicKey { listener, server }).copied()
}

/// Whether an address is on an access list.
#[inline(always)]
pub fn is_listed(acl: u32, addr: &Address) -> bool {
    let bits = abi::listed_bits(u128::BITS);
    SLB_ACL.get(&Key::new(bits, abi::listed(acl, *addr))).is_some()
}

/// A source address towards backends.
#[inline(always)]
pub fn source(index: u16) -> Option<SharedCell<Address>> {
    SLB_SOURCES.cell(index.into())
}

/// The agent's settings.
#[derive(Clone, Copy)]
pub struct CurrentSettings(Option<SharedCell<Settings>>);

macro_rules! settings {
    ($($name:ident: u32,)+) => {
        impl CurrentSettings {$(
            #[inline(always)]
            pub fn $name(self) -> u32 {
                self.0.map_or(0, |settings| settings.$name().load())
            }
        )+}
    };
}
settings! {
    route_epoch: u32,
    opening_jiffies: u32,
    closing_jiffies: u32,
    fragment_jiffies: u32,
    no_listener: u32,
    generic: u32,
    veth: u32,
    acl_epoch: u32,
}

/// What the outer source addresses of tunnels begin with.
#[inline(always)]
pub fn tunnel_source(is_v4: bool) -> Option<Address> {
    let settings = SLB_SETTINGS.cell(0)?;
    let source = if is_v4 { settings.tunnel_v4() } else { settings.tunnel_v6() };
    Some(source.load())
}

/// The agent's settings, each as it is when it is asked for.
#[inline(always)]
pub fn settings() -> CurrentSettings {
    CurrentSettings(SLB_SETTINGS.cell(0))
}
