//! Which slot a flow begins with: by the listener's schedule, by session persistence, by the fewest flows, or by QUIC
//! connection IDs.

use super::{Lookups, Step, is_kept, is_open};
use crate::{
    abi::{
        BackendFlags, FlowKey, LEAST_CANDIDATES, Listener, NO_BACKEND, NOT_CHOSEN, QuicKey,
        SLOT_BACKEND, SLOT_KEEP, Scheduler, Sticky,
    },
    hash,
    packet::Packet,
    verdict::Verdict,
};

/// The slot of a flow that begins, where the listener chooses by more than its schedule. `hash` is the packet's
/// [`hash::flow`] with the listener's seed.
///
/// # Errors
///
/// [`Verdict::NoBackend`], or a map could not be read.
#[inline(always)]
pub fn choose<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    listener: &Listener,
    hash: u64,
) -> Result<u32, L::Error> {
    if listener.sticky_jiffies == 0 {
        return schedule(look, packet, listener, hash);
    }
    let client = &packet.key.src;
    let expires = look.now().wrapping_add(listener.sticky_jiffies);
    let kept = look.kept(listener, client)?.filter(|(sticky, _)| is_kept(look.now(), sticky));
    if let Some((sticky, kept)) = kept {
        let id = sticky.backend;
        let is_open = look.backend(id)?.is_some_and(|backend| is_open(listener, &backend));
        look.step(Step::Kept(Some((id, is_open))));
        if is_open {
            look.keep(kept, expires);
            return Ok(id | SLOT_KEEP);
        }
    } else {
        look.step(Step::Kept(None));
    }
    let slot = schedule(look, packet, listener, hash)?;
    let backend = slot & SLOT_BACKEND;
    if backend != NO_BACKEND {
        look.stick(listener, client, Sticky { backend, expires });
    }
    Ok(slot | SLOT_KEEP)
}

/// The slot that the listener's scheduler chooses for a flow that begins.
#[inline(always)]
fn schedule<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    listener: &Listener,
    hash: u64,
) -> Result<u32, L::Error> {
    if listener.scheduler == Scheduler::LEAST {
        return least(look, listener);
    }
    if listener.scheduler == Scheduler::QUIC
        && let Some(id) = look.connection_id(packet)
    {
        if let Some(server) = id.server
            && let Some(backend) = by_server(look, listener.id, server)?
        {
            return Ok(backend | SLOT_KEEP);
        }
        let choice = hash::choice_of_id(id.id, &listener.seed);
        let (_, slot) = slot(look, listener.first_chunk, listener.slots, choice)?;
        return Ok(slot | SLOT_KEEP);
    }
    let slot = by_schedule(look, listener, &packet.key, hash, true)?;
    // Datagrams without a connection ID have no other.
    Ok(if listener.scheduler == Scheduler::QUIC { slot | SLOT_KEEP } else { slot })
}

/// The backend that has issued a connection ID. It knows the connection, so it gets it whatever its weight, as long
/// as it is there.
#[inline(always)]
fn by_server<L: Lookups>(look: &L, listener: u32, server: u32) -> Result<Option<u32>, L::Error> {
    const OUT: BackendFlags = BackendFlags::CLOSED.union(BackendFlags::UNHEALTHY);
    let Some(id) = look.server(QuicKey { listener, server })? else { return Ok(None) };
    let Some(backend) = look.backend(id)? else { return Ok(None) };
    let is_it = backend.flags & (BackendFlags::IN_USE | OUT) == BackendFlags::IN_USE
        && u32::from(backend.listener) == listener;
    Ok(is_it.then_some(id))
}

/// Of the next slots in turn the one whose backend has the fewest flows for its weight.
#[inline(always)]
fn least<L: Lookups>(look: &mut L, listener: &Listener) -> Result<u32, L::Error> {
    let slots = listener.slots;
    if slots == 0 {
        return Err(Verdict::NoBackend.into());
    }
    let turn = turn(look, listener)?;
    let (mut found, mut found_flows, mut found_weight) = (NOT_CHOSEN, 0, 0);
    for step in 0..LEAST_CANDIDATES {
        if step >= slots {
            break;
        }
        let slot = look.slot(listener.first_chunk, turn.wrapping_add(step) % slots)?;
        let id = slot & SLOT_BACKEND;
        let Some(backend) = look.backend(id)? else { continue };
        let active = look.active(id)?;
        // Below 0 for the moment between two CPUs. A flow more, so that the larger of two idle ones is first.
        let flows = if active > i64::MAX as u64 { 1 } else { active.wrapping_add(1) };
        let weight = u64::from(backend.weight);
        look.step(Step::Candidate { backend: id, active, weight });
        if found == NOT_CHOSEN || flows * found_weight < found_flows * weight {
            (found, found_flows, found_weight) = (slot | SLOT_KEEP, flows, weight);
        }
    }
    if found == NOT_CHOSEN {
        return Err(Verdict::NoBackend.into());
    }
    look.step(Step::Least { slot: found });
    Ok(found)
}

/// The slot of a packet without an entry; `begins`: a flow begins with it.
///
/// TCP in the middle of a connection goes by the schedule before, if it is older than the last
/// change; otherwise it gets the backend that the hash gives: that is how another gateway has chosen.
/// A scheduler that counts has no such answer.
///
/// # Errors
///
/// [`Verdict::NoBackend`], [`Verdict::Reset`], or a map could not be read.
#[inline(always)]
pub fn by_schedule<L: Lookups>(
    look: &mut L,
    listener: &Listener,
    key: &FlowKey,
    hash: u64,
    begins: bool,
) -> Result<u32, L::Error> {
    if !begins && listener.previous_slots != 0 {
        let seed = &listener.previous_seed;
        let previous_hash = look.hash(key, seed);
        let choice = hash::choice_by(listener.previous_scheduler, key, previous_hash, seed);
        let (number, previous) =
            slot(look, listener.previous_chunk, listener.previous_slots, choice)?;
        if previous & SLOT_BACKEND != NO_BACKEND {
            look.step(Step::Previous { number, slot: previous });
            return Ok(previous | SLOT_KEEP);
        }
    }
    if listener.scheduler.is_by_hash() {
        let choice = hash::choice_by(listener.scheduler, key, hash, &listener.seed);
        let (number, slot) = slot(look, listener.first_chunk, listener.slots, choice)?;
        look.step(Step::ByHash { number, slot });
        return Ok(slot);
    }
    if listener.slots == 0 {
        return Err(Verdict::NoBackend.into());
    }
    if !begins && listener.slots != 1 {
        look.step(Step::Unknown);
        return Err(Verdict::Reset.into());
    }
    if listener.scheduler == Scheduler::QUIC {
        let (number, slot) = slot(look, listener.first_chunk, listener.slots, hash::choice(hash))?;
        look.step(Step::WithoutId { number, slot });
        return Ok(slot);
    }
    let turn = turn(look, listener)?;
    let slot = look.slot(listener.first_chunk, turn)?;
    look.step(Step::Turn { turn, slots: listener.slots, slot });
    Ok(slot | SLOT_KEEP)
}

/// The number of the next slot in turn of a listener that has some.
#[inline(always)]
fn turn<L: Lookups>(look: &mut L, listener: &Listener) -> Result<u32, L::Error> {
    Ok((look.turn(listener.id)? % u64::from(listener.slots)) as u32)
}

/// Number and value of the slot that a hash chooses, of a schedule of so many slots.
///
/// # Errors
///
/// [`Verdict::NoBackend`]: it has none; or a map could not be read.
#[inline(always)]
pub fn slot<L: Lookups>(
    look: &L,
    first_chunk: u32,
    slots: u32,
    choice: u32,
) -> Result<(u32, u32), L::Error> {
    if slots == 0 {
        return Err(Verdict::NoBackend.into());
    }
    let number = hash::slot(choice, slots);
    Ok((number, look.slot(first_chunk, number)?))
}
