//! A packet to a VIP without an entry: its backend, and which entries its flow needs.

use super::{Lookups, Step, begins, by_schedule, check_ttl, is_recent};
use crate::{
    abi::{Backend, BackendFlags, Mode, NO_BACKEND, NOT_CHOSEN, Roles, SLOT_BACKEND, SLOT_KEEP},
    packet::Packet,
    verdict::Verdict,
};

/// Which entries a flow needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entries {
    /// That of the client's packets.
    Forward = 0,
    /// That of the answers as well.
    Both = 1,
    /// Both, and the backend is to see a source address of ours.
    OwnSource = 2,
}

/// Where a packet without an entry goes.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// To a backend that sees the client's address.
    Backend {
        /// Its index.
        id: u32,
        /// Source port towards it.
        port: u16,
    },
    /// To one that sees an address of ours, as its entry says.
    OwnSource {
        /// Its index.
        id: u32,
    },
}

/// Decides on a packet without an entry, and has the entries made that its flow needs. `hash` is the packet's
/// [`crate::hash::flow`] with the listener's seed.
///
/// # Errors
///
/// A verdict: it goes no further. The gateway answers those of [`super::is_answered`].
#[inline(always)]
pub fn begin<L: Lookups>(look: &mut L, packet: &Packet, hash: u64) -> Result<Beginning, L::Error> {
    let key = &packet.key;
    let listener = look.listener(&key.destination())?.ok_or(Verdict::NoListener)?;
    let begins = begins(packet);
    let slot = match look.chosen() {
        NOT_CHOSEN => by_schedule(look, &listener, key, hash, begins)?,
        slot => slot,
    };
    let id = slot & SLOT_BACKEND;
    if id == NO_BACKEND {
        look.step(Step::NoBackend);
        return Err(Verdict::NoBackend.into());
    }
    let backend = look.backend(id)?.ok_or(Verdict::Inconsistent)?;
    check_ttl(look, backend.hop)?;
    if backend.flags.intersects(BackendFlags::CLOSED) && !begins {
        look.step(Step::Closed { backend: id });
        return Err(Verdict::Closed.into());
    }
    // The backend is told about the client as a connection begins, and knows this one from another port.
    if backend.flags.intersects(BackendFlags::PROXY | BackendFlags::OPTION) && !begins {
        look.step(Step::TooLate { backend: id });
        return Err(Verdict::Reset.into());
    }
    if backend.mode == Mode::FULL || is_hairpin(look, packet, id, &backend)? {
        let made = look.remember(key, id, Entries::OwnSource)?;
        made.ok_or(Verdict::TableFull)?;
        return Ok(Beginning::OwnSource { id });
    }
    let is_hash = listener.scheduler.is_by_hash() && look.chosen() == NOT_CHOSEN;
    // That of the client may be a direct flow's, or that of another client port.
    let is_shared = backend.flags.intersects(BackendFlags::SHARED)
        || is_recent(look, look.bypass_until(), id)? && look.is_taken(key, id, &backend)?;
    if slot & SLOT_KEEP == 0 && !is_shared {
        return Ok(Beginning::Backend { id, port: key.sport });
    }
    let entries = if is_shared { Entries::Both } else { Entries::Forward };
    let port = match look.remember(key, id, entries)? {
        Some(port) => port,
        // By hash the flow finds its backend again, as long as its slot is not changed.
        None if is_hash && !is_shared => key.sport,
        None => return Err(Verdict::TableFull.into()),
    };
    Ok(Beginning::Backend { id, port })
}

/// Whether a backend is the client of another, or of itself, on the same side of the gateway: the answer
/// would go there without us, from an address that the client has not asked.
#[inline(always)]
fn is_hairpin<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    id: u32,
    backend: &Backend,
) -> Result<bool, L::Error> {
    let is_hairpin = backend.mode == Mode::NAT
        && backend.hop.ifindex == look.ingress()
        && look.roles(&packet.key.src)?.intersects(Roles::BACKEND);
    if is_hairpin {
        let ingress = look.ingress();
        look.step(Step::Hairpin { backend: id, ingress });
    }
    Ok(is_hairpin)
}
