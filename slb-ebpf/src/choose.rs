//! Which backend a flow begins with, where that is more than a look at the schedule: session persistence,
//! the fewest flows, QUIC connection IDs.

use slb_common::{
    abi::{
        BACKEND_CLOSED, BACKEND_IN_USE, BACKEND_UNHEALTHY, BACKEND_USABLE, Backend, Keys,
        LEAST_CANDIDATES, Listener, NO_BACKEND, NOT_CHOSEN, QuicKey, SCHEDULER_LEAST,
        SCHEDULER_QUIC, SLOT_BACKEND, SLOT_KEEP, STAGE_FLOW, Sticky, StickyKey, UDP,
    },
    quic,
    verdict::Verdict,
};

use crate::{
    flows, forward, maps,
    work::{Exit, Sent, Work},
};

/// Notes the choice for the program that makes the entries.
#[inline(always)]
pub fn choose(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let to = work.packet.key.destination();
    let listener = maps::listener(&to).ok_or(Verdict::NoListener)?;
    // What began before goes by what was the rule then.
    if work.packet.is_syn() || work.packet.key.proto == UDP {
        work.handover.chosen = begin(work, listener)?;
    }
    Err(Exit::Stage(STAGE_FLOW))
}

/// The slot of a flow that begins.
#[inline(always)]
fn begin(work: &Work<'_>, listener: &Listener) -> Result<u32, Verdict> {
    if listener.sticky_jiffies == 0 {
        return schedule(work, listener);
    }
    let Keys { sticky: key, .. } = maps::keys().ok_or(Verdict::Inconsistent)?;
    *key = StickyKey { client: work.packet.key.src.copied(), listener: listener.id, spare: 0 };
    let key: &StickyKey = key;
    let expires = work.now.wrapping_add(listener.sticky_jiffies);
    // SAFETY: an element of the map lives until the program ends; two CPUs that write to it write much the same.
    if let Some(sticky) = maps::SLB_STICKY.get_ptr_mut(key).map(|sticky| unsafe { &mut *sticky })
        && !flows::is_over(work.now, sticky.expires)
        && maps::backend(sticky.backend).is_some_and(|backend| is_open(listener, backend))
    {
        sticky.expires = expires;
        return Ok(sticky.backend | SLOT_KEEP);
    }
    let slot = schedule(work, listener)?;
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
fn schedule(work: &Work<'_>, listener: &Listener) -> Result<u32, Verdict> {
    if listener.scheduler == SCHEDULER_LEAST {
        return least(listener);
    }
    if listener.scheduler == SCHEDULER_QUIC
        && let Some(id) = quic::connection_id(&work.frame, work.packet)
    {
        if let Some(server) = id.server
            && let Some(backend) = by_server(listener.id, server)
        {
            return Ok(backend | SLOT_KEEP);
        }
        let slot = forward::slot(listener.first_chunk, listener.slots, id.choice)?;
        return Ok(slot | SLOT_KEEP);
    }
    let slot = forward::choose(listener, &work.packet.key, work.handover.hash, true)?;
    // Datagrams without a connection ID have no other.
    Ok(if listener.scheduler == SCHEDULER_QUIC { slot | SLOT_KEEP } else { slot })
}

/// The backend that has issued a connection ID. It knows the connection, so it gets it whatever its weight, as long
/// as it is there.
#[inline(always)]
fn by_server(listener: u32, server: u32) -> Option<u32> {
    // SAFETY: copied out at once.
    let id = *unsafe { maps::SLB_QUIC.get(QuicKey { listener, server }) }?;
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
    let turn = forward::turn(listener)?;
    let (mut found, mut found_flows, mut found_weight) = (NOT_CHOSEN, 0, 0);
    for step in 0..LEAST_CANDIDATES {
        if step >= slots {
            break;
        }
        let slot = forward::at(listener.first_chunk, turn.wrapping_add(step) % slots)?;
        let id = slot & SLOT_BACKEND;
        let Some(backend) = maps::backend(id) else { continue };
        let active = maps::SLB_ACTIVE.get(id).copied().unwrap_or_default();
        // Below 0 for the moment between two CPUs. A flow more, so that the larger of two idle ones is first.
        let flows = if active > i64::MAX as u64 { 1 } else { active.wrapping_add(1) };
        let weight = u64::from(backend.weight);
        if found == NOT_CHOSEN || flows * found_weight < found_flows * weight {
            (found, found_flows, found_weight) = (slot | SLOT_KEEP, flows, weight);
        }
    }
    if found == NOT_CHOSEN { Err(Verdict::NoBackend) } else { Ok(found) }
}
