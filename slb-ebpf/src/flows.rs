//! The flow table: one entry per direction, keyed by what arrives.
//!
//! The two entries of a flow are *twins*: each can be computed from the other, so that a packet in
//! either direction needs one look-up, and the table never keeps one without the other for long.
//!
//! A backend knows a flow by the client's address and port. Two flows of one client port to the
//! same backend and port (through two listeners, or one of them direct) would be one to it: whoever
//! comes second gets another source port.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_jiffies64};
use slb_common::{
    abi::{
        self, Backend, FIN_FORWARD, FIN_REPLY, FLOW_DIRECT, FLOW_FORWARD, FLOW_REPLY, Flow,
        FlowKey, REFRESH_JIFFIES, age,
    },
    hash,
    parse::{FIN, RST},
    verdict::Verdict,
};

use crate::{Work, hops, maps};

/// How many source ports are tried before a flow is given up.
const PORT_ATTEMPTS: u32 = 8;
/// First port that may replace a client's.
const FIRST_PORT: u32 = 1_024;

/// The clock of the flow table: wraps, so only differences mean something.
#[inline(always)]
pub fn now() -> u32 {
    // SAFETY: reads a counter of the kernel.
    unsafe { bpf_jiffies64() as u32 }
}

/// The entry of a packet.
#[inline(always)]
pub fn find(key: &FlowKey) -> Option<&'static mut Flow> {
    // SAFETY: if the entry is evicted and given to another flow meanwhile, that flow's `state` or
    // `last_seen` may be off for a moment: the price of an LRU table, and harmless.
    maps::SLB_FLOWS.get_ptr_mut(key).map(|flow| unsafe { &mut *flow })
}

/// Takes down what a packet says about its flow.
#[inline(always)]
pub fn note(work: &Work<'_>, flow: &mut Flow) {
    if work.packet.flags & (FIN | RST) != 0 {
        let fin = if flow.kind == FLOW_FORWARD { FIN_FORWARD } else { FIN_REPLY };
        note_end(work, flow, fin);
    }
    if age(work.now, flow.last_seen) >= REFRESH_JIFFIES {
        flow.last_seen = work.now;
        if flow.kind != FLOW_DIRECT {
            keep_twin(work, flow);
        }
    }
}

/// Takes down that one side has closed; `fin` is that side's bit.
#[inline(always)]
pub fn note_end(work: &Work<'_>, flow: &mut Flow, fin: u32) {
    if work.packet.flags & RST != 0 {
        flow.state |= abi::RST;
    } else if work.packet.flags & FIN != 0 {
        flow.state |= fin;
    }
}

/// Looks at the other direction's entry, which makes it recently used, and puts it back if the table
/// has lost it.
#[inline(never)]
fn keep_twin(work: &Work<'_>, flow: &Flow) {
    let key = &work.packet.key;
    let twin_key = flow.twin(key);
    let is_forward = flow.kind == FLOW_FORWARD;
    if let Some(twin) = find(&twin_key) {
        if is_forward && twin.epoch != hops::route_epoch() {
            // Should the kernel not know the way to the client: it has come this way a moment ago.
            twin.hop = hops::back(work);
        }
        return;
    }
    let twin = Flow {
        addr: if is_forward { key.dst } else { key.src },
        sport: key.dport,
        dport: key.sport,
        backend: flow.backend,
        kind: if is_forward { FLOW_REPLY } else { FLOW_FORWARD },
        state: 0,
        last_seen: work.now,
        epoch: hops::route_epoch().wrapping_sub(1),
        hop: hops::back(work),
    };
    // A table that has no room for it now may have some in a second.
    let _ = insert(&twin_key, &twin);
}

/// Whether both sides of a connection have closed, or one has reset it.
#[inline(never)]
pub fn has_ended(key: &FlowKey, flow: &Flow) -> bool {
    let twin = find(&flow.twin(key)).map_or(0, |twin| twin.state);
    abi::has_ended(flow.state | twin)
}

/// Whether a flow is idle in both directions, given its client's key and entry.
#[inline(never)]
pub fn is_idle(now: u32, key: &FlowKey, flow: &Flow, idle: u32) -> bool {
    if age(now, flow.last_seen) <= idle {
        return false;
    }
    match find(&flow.twin(key)) {
        Some(twin) if is_reply_of(twin, key) => age(now, twin.last_seen) > idle,
        _ => true,
    }
}

/// Whether nobody uses this entry any more: its flow has ended, or is idle in both directions. `twin` is
/// the other direction's entry, if the table has it.
#[inline(always)]
fn is_abandoned(now: u32, flow: &Flow, twin: Option<&Flow>) -> bool {
    let idle = maps::backend(flow.backend).map_or(0, |backend| backend.idle_jiffies);
    let is_idle = |flow: &Flow| age(now, flow.last_seen) > idle;
    let twin_state = twin.map_or(0, |twin| twin.state);
    abi::has_ended(flow.state | twin_state) || is_idle(flow) && twin.is_none_or(is_idle)
}

/// Removes the flow that `key` had, if any: another is to begin under it. One that is direct would
/// not overwrite the entry.
#[inline(never)]
pub fn forget(key: &FlowKey) {
    let Some(flow) = find(key) else { return };
    let twin_key = flow.twin(key);
    if let Some(twin) = find(&twin_key)
        && is_reply_of(twin, key)
    {
        remove(&twin_key);
    }
    remove(key);
}

/// Whether `reply` is the reply entry of the flow whose client sends `key`.
#[inline(always)]
fn is_reply_of(reply: &Flow, key: &FlowKey) -> bool {
    reply.kind == FLOW_REPLY
        && reply.sport == key.dport
        && reply.dport == key.sport
        && reply.addr.same(key.dst)
}

/// Whether `forward` is the client's entry of the flow whose backend answers with `key`: the table may
/// have lost that entry, and the client's key begun a newer flow.
#[inline(always)]
fn is_forward_of(forward: &Flow, key: &FlowKey) -> bool {
    forward.kind == FLOW_FORWARD
        && forward.sport == key.dport
        && forward.dport == key.sport
        && forward.addr.same(key.src)
}

/// Makes `key`, what a backend answers with, free for the flow of `work`, if nobody uses it.
#[inline(never)]
fn claim(work: &Work<'_>, key: &FlowKey) -> bool {
    let Some(owner) = find(key) else { return true };
    if is_reply_of(owner, &work.packet.key) {
        return true;
    }
    let twin_key = owner.twin(key);
    let twin = match find(&twin_key) {
        Some(twin) if owner.kind == FLOW_REPLY && is_forward_of(twin, key) => Some(&*twin),
        _ => None,
    };
    if !is_abandoned(work.now, owner, twin) {
        return false;
    }
    if twin.is_some() {
        remove(&twin_key);
    }
    true
}

/// Makes the entries of a new flow to `backend`, whose index is `id`.
///
/// `kind` is that of the backend's entry. [`FLOW_DIRECT`] has no other, and is passed as it is;
/// unless the client's port is taken: then it becomes a flow like any other.
#[inline(always)]
pub fn create(work: &Work<'_>, id: u32, backend: &Backend, kind: u32) -> Result<(), Verdict> {
    let key = &work.packet.key;
    let mut reply_key = FlowKey {
        src: backend.addr,
        dst: key.src,
        sport: backend.port as u16,
        dport: key.sport,
        proto: key.proto,
    };
    let flow = maps::SLB_SCRATCH.get_ptr_mut(0).ok_or(Verdict::Inconsistent)?;
    // SAFETY: this CPU's own, and a program is not interrupted by another on its CPU.
    let flow = unsafe { &mut *flow };
    *flow = Flow {
        addr: key.dst,
        sport: key.dport,
        dport: key.sport,
        backend: id,
        kind,
        state: 0,
        last_seen: work.now,
        // Looked up with the first reply, by when the kernel may have met the client.
        epoch: hops::route_epoch().wrapping_sub(1),
        hop: hops::back(work),
    };
    let mut draw = hash::flow(key);
    let mut attempts = 0;
    while !claim(work, &reply_key) {
        if attempts == PORT_ATTEMPTS {
            return Err(Verdict::NoPort);
        }
        attempts += 1;
        draw = draw.wrapping_mul(0x9e37_79b1).wrapping_add(1);
        reply_key.dport = (FIRST_PORT + hash::slot(draw, 0x1_0000 - FIRST_PORT)) as u16;
        flow.kind = FLOW_REPLY;
    }
    let inserted = insert(&reply_key, flow);
    if flow.kind == FLOW_DIRECT {
        // Not remembered is no reason not to pass it.
        return Err(Verdict::Direct);
    }
    inserted?;
    flow.addr = backend.addr;
    flow.sport = reply_key.dport;
    flow.dport = reply_key.sport;
    flow.kind = FLOW_FORWARD;
    insert(key, flow)
}

/// Writes an entry.
#[inline(always)]
fn insert(key: &FlowKey, flow: &Flow) -> Result<(), Verdict> {
    maps::SLB_FLOWS.insert(key, flow, BPF_ANY.into()).map_err(|_| Verdict::TableFull)
}

/// Removes an entry, if it is there.
#[inline(always)]
fn remove(key: &FlowKey) {
    // By reference: a copy would not fit on the stack any more.
    let _ = maps::SLB_FLOWS.remove(key);
}
