//! Every map: who writes it, who reads it, what a missing entry means. `docs/maps.md` shows dumps.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray},
    macros::btf_map,
};
use slb_common::{
    abi::{
        Address, Backend, Chunk, Counter, DEFAULT_CHUNKS, DEFAULT_FLOW_ENTRIES, DirectEndpoint,
        Endpoint, Flow, FlowKey, Interface, Listener, MAX_BACKENDS, MAX_ENDPOINTS, MAX_INTERFACES,
        MAX_LISTENERS, Roles, Settings, Traffic,
    },
    verdict::MAX_VERDICTS,
};

/// Not preallocated: a replaced value lives on until the packets that have looked it up are done.
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Written by the agent. Missing: no listener there.
#[btf_map]
pub static SLB_LISTENERS: HashMap<Endpoint, Listener, MAX_LISTENERS, NO_PREALLOC> = HashMap::new();

/// Written by the agent; only chunks that no listener refers to are written.
#[btf_map]
pub static SLB_SLOTS: Array<Chunk, DEFAULT_CHUNKS> = Array::new();

/// Written by the program: how many flows each listener has given out in turn.
#[btf_map]
pub static SLB_CURSORS: Array<u64, MAX_LISTENERS> = Array::new();

/// Written by the agent.
#[btf_map]
pub static SLB_BACKENDS: Array<Backend, MAX_BACKENDS> = Array::new();

/// Written by the agent. Missing: the address means nothing to us.
#[btf_map]
pub static SLB_ADDRESSES: HashMap<Address, Roles, MAX_ENDPOINTS, NO_PREALLOC> = HashMap::new();

/// Written by the agent. Missing: nobody balances to that address and port.
#[btf_map]
pub static SLB_ENDPOINTS: HashMap<Endpoint, DirectEndpoint, MAX_ENDPOINTS, NO_PREALLOC> =
    HashMap::new();

/// Written by the agent. Missing: XDP cannot send there, the kernel has to.
#[btf_map]
pub static SLB_INTERFACES: HashMap<u32, Interface, MAX_INTERFACES, NO_PREALLOC> = HashMap::new();

/// Written by the agent.
#[btf_map]
pub static SLB_SETTINGS: Array<Settings, 1> = Array::new();

/// Written by the program. Missing: a new flow. Full: the least recently used goes.
#[btf_map]
pub static SLB_FLOWS: LruHashMap<FlowKey, Flow, DEFAULT_FLOW_ENTRIES> = LruHashMap::new();

/// Written by the program; the index is [`slb_common::verdict::Verdict`].
#[btf_map]
pub static SLB_VERDICTS: PerCpuArray<Counter, MAX_VERDICTS> = PerCpuArray::new();

/// Written by the program; indexed like `SLB_BACKENDS`.
#[btf_map]
pub static SLB_TRAFFIC: PerCpuArray<Traffic, MAX_BACKENDS> = PerCpuArray::new();

/// Written and read by the program: the entry that is being made, for which its stack has no room.
#[btf_map]
pub static SLB_SCRATCH: PerCpuArray<Flow, 1> = PerCpuArray::new();

/// A backend by its index.
#[inline(always)]
pub fn backend(id: u32) -> Option<&'static Backend> {
    SLB_BACKENDS.get(id)
}
