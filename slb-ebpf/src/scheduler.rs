//! Which backend a flow begins with: by the listener's schedule, and in [`Program::Scheduler`] by session persistence,
//! the fewest flows, or QUIC connection IDs.

use slb_common::{
    abi::{
        self, BACKEND_CLOSED, BACKEND_IN_USE, BACKEND_UNHEALTHY, BACKEND_USABLE, Backend,
        CHUNK_SLOTS, FlowKey, LEAST_CANDIDATES, Listener, NO_BACKEND, NOT_CHOSEN, SCHEDULER_LEAST,
        SCHEDULER_QUIC, SLOT_BACKEND, SLOT_KEEP, Sticky, StickyKey, UDP, is_over,
    },
    hash,
    programs::Program,
    quic,
    verdict::Verdict,
};

use crate::{
    cell::{Elements as _, SharedCell},
    ctx::PacketCtx,
    maps,
    outcome::{Next, Outcome},
};

/// Notes the choice for the program that makes the entries.
#[inline(always)]
pub fn choose(pkt: &mut PacketCtx<'_>) -> Outcome {
    let to = pkt.packet.key.destination();
    let listener = maps::listener(&to).ok_or(Verdict::NoListener)?;
    // What began before goes by what was the rule then.
    if pkt.packet.is_syn() || pkt.packet.key.proto == UDP {
        pkt.args.chosen = begin(pkt, listener)?;
    }
    Ok(Next::TailCall(Program::Flow))
}

/// The slot of a flow that begins.
#[inline(always)]
fn begin(pkt: &PacketCtx<'_>, listener: &Listener) -> Result<u32, Verdict> {
    if listener.sticky_jiffies == 0 {
        return schedule(pkt, listener);
    }
    let key = maps::sticky_key().ok_or(Verdict::Inconsistent)?;
    *key = StickyKey { client: pkt.packet.key.src.copied(), listener: listener.id, spare: 0 };
    let key: &StickyKey = key;
    let expires = pkt.now.wrapping_add(listener.sticky_jiffies);
    // Two CPUs that write to it write much the same.
    if let Some(sticky) = maps::SLB_STICKY.cell(key)
        && !is_over(pkt.now, sticky.expires().load())
    {
        let id = sticky.backend().load();
        if maps::backend(id).is_some_and(|backend| is_open(listener, backend)) {
            sticky.expires().store(expires);
            return Ok(id | SLOT_KEEP);
        }
    }
    let slot = schedule(pkt, listener)?;
    let backend = slot & SLOT_BACKEND;
    if backend != NO_BACKEND {
        // Without room for it, its client's next flow may go elsewhere.
        let _ = maps::SLB_STICKY.insert(key, Sticky { backend, expires }, 0);
    }
    Ok(slot | SLOT_KEEP)
}

/// Whether a backend of the listener takes new flows.
#[inline(always)]
fn is_open(listener: &Listener, backend: &Backend) -> bool {
    const OPEN: u32 = BACKEND_IN_USE | BACKEND_USABLE;
    u32::from(backend.listener) == listener.id
        && backend.flags & (OPEN | BACKEND_CLOSED) == OPEN
        && backend.weight != 0
}

/// The slot that the listener's scheduler chooses.
#[inline(always)]
fn schedule(pkt: &PacketCtx<'_>, listener: &Listener) -> Result<u32, Verdict> {
    if listener.scheduler == SCHEDULER_LEAST {
        return least(listener);
    }
    if listener.scheduler == SCHEDULER_QUIC
        && let Some(id) = quic::connection_id(&pkt.frame, pkt.packet)
    {
        if let Some(server) = id.server
            && let Some(backend) = by_server(listener.id, server)
        {
            return Ok(backend | SLOT_KEEP);
        }
        let slot = slot(listener.first_chunk, listener.slots, id.choice)?;
        return Ok(slot | SLOT_KEEP);
    }
    let slot = by_schedule(listener, &pkt.packet.key, pkt.args.hash, true)?;
    // Datagrams without a connection ID have no other.
    Ok(if listener.scheduler == SCHEDULER_QUIC { slot | SLOT_KEEP } else { slot })
}

/// The backend that has issued a connection ID. It knows the connection, so it gets it whatever its weight, as long
/// as it is there.
#[inline(always)]
fn by_server(listener: u32, server: u32) -> Option<u32> {
    let id = maps::quic_backend(listener, server)?;
    let backend = maps::backend(id)?;
    const OUT: u32 = BACKEND_CLOSED | BACKEND_UNHEALTHY;
    let is_it = backend.flags & (BACKEND_IN_USE | OUT) == BACKEND_IN_USE
        && u32::from(backend.listener) == listener;
    is_it.then_some(id)
}

/// Of the next slots in turn the one whose backend has the fewest flows for its weight.
#[inline(always)]
fn least(listener: &Listener) -> Result<u32, Verdict> {
    let slots = listener.slots;
    if slots == 0 {
        return Err(Verdict::NoBackend);
    }
    let turn = turn(listener)?;
    let (mut found, mut found_flows, mut found_weight) = (NOT_CHOSEN, 0, 0);
    for step in 0..LEAST_CANDIDATES {
        if step >= slots {
            break;
        }
        let slot = at(listener.first_chunk, turn.wrapping_add(step) % slots)?;
        let id = slot & SLOT_BACKEND;
        let Some(backend) = maps::backend(id) else { continue };
        let active = maps::SLB_ACTIVE.cell(id).map_or(0, SharedCell::load);
        // Below 0 for the moment between two CPUs. A flow more, so that the larger of two idle ones is first.
        let flows = if active > i64::MAX as u64 { 1 } else { active.wrapping_add(1) };
        let weight = u64::from(backend.weight);
        if found == NOT_CHOSEN || flows * found_weight < found_flows * weight {
            (found, found_flows, found_weight) = (slot | SLOT_KEEP, flows, weight);
        }
    }
    if found == NOT_CHOSEN { Err(Verdict::NoBackend) } else { Ok(found) }
}

/// The slot of a packet without an entry.
///
/// TCP in the middle of a connection goes by the schedule before, if it is older than the last
/// change; otherwise it gets the backend that the hash gives: that is how another gateway has chosen.
/// A scheduler that counts has no such answer.
#[inline(always)]
pub fn by_schedule(
    listener: &Listener,
    key: &FlowKey,
    hash: u64,
    begins: bool,
) -> Result<u32, Verdict> {
    if !begins && listener.previous_slots != 0 {
        let choice = hash::choice_by(listener.previous_scheduler, key, hash);
        let previous = slot(listener.previous_chunk, listener.previous_slots, choice)?;
        if previous & SLOT_BACKEND != NO_BACKEND {
            return Ok(previous | SLOT_KEEP);
        }
    }
    if abi::is_by_hash(listener.scheduler) {
        let choice = hash::choice_by(listener.scheduler, key, hash);
        return slot(listener.first_chunk, listener.slots, choice);
    }
    if listener.slots == 0 {
        return Err(Verdict::NoBackend);
    }
    if !begins && listener.slots != 1 {
        return Err(Verdict::NoFlow);
    }
    if listener.scheduler == SCHEDULER_QUIC {
        return slot(listener.first_chunk, listener.slots, hash::choice(hash));
    }
    Ok(at(listener.first_chunk, turn(listener)?)? | SLOT_KEEP)
}

/// The next slot in turn of a listener that has some.
#[inline(always)]
fn turn(listener: &Listener) -> Result<u32, Verdict> {
    let cursor = maps::SLB_RR_CURSORS.cell(listener.id).ok_or(Verdict::Inconsistent)?;
    Ok((cursor.fetch_add(1) % u64::from(listener.slots)) as u32)
}

/// The slot that a hash chooses.
#[inline(always)]
pub fn slot(first_chunk: u32, slots: u32, choice: u32) -> Result<u32, Verdict> {
    if slots == 0 {
        return Err(Verdict::NoBackend);
    }
    at(first_chunk, hash::slot(choice, slots))
}

/// The slot of a number.
#[inline(always)]
fn at(first_chunk: u32, slot: u32) -> Result<u32, Verdict> {
    let chunk = maps::SLB_SLOTS
        .get(first_chunk.wrapping_add(slot / CHUNK_SLOTS as u32))
        .ok_or(Verdict::Inconsistent)?;
    Ok(chunk.slots[slot as usize % CHUNK_SLOTS])
}
