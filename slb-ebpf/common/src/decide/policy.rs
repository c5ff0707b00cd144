//! Who gets in: access lists, and limits of new flows and of bandwidth.

use super::{Lookups, Step};
use crate::{
    abi::{Address, Listener, ListenerFlags, UDP},
    packet::Packet,
    verdict::Verdict,
};

/// What a listener may take so much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// New flows of one source.
    Source,
    /// New flows.
    Flows,
    /// Bytes from clients.
    Bytes,
    /// Bytes from backends.
    Replies,
}

/// Whether a client's packet gets to a guarded listener.
///
/// # Errors
///
/// [`Verdict::Denied`], [`Verdict::SourceLimit`], [`Verdict::FlowLimit`], [`Verdict::BandwidthLimit`], or a map could not be read.
#[inline(always)]
pub fn admit<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    listener: &Listener,
) -> Result<(), L::Error> {
    let key = &packet.key;
    if listener.flags.intersects(ListenerFlags::ALLOW | ListenerFlags::DENY) {
        let is_listed = look.is_listed(listener.acl, &key.src)?;
        look.step(Step::AccessList { listener, is_listed });
        if is_listed != (listener.flags.intersects(ListenerFlags::ALLOW)) {
            return Err(Verdict::Denied.into());
        }
    }
    if !listener.flags.intersects(ListenerFlags::LIMITED) {
        return Ok(());
    }
    if packet.is_syn() || key.proto == UDP && !look.is_known(key)? {
        // First: what one source has too many of takes nothing from the others.
        look.police(listener.id, &key.src, Limit::Source)?;
        look.police(listener.id, &key.src, Limit::Flows)?;
    }
    look.police(listener.id, &key.src, Limit::Bytes)
}

/// Whether an ICMP error about what a VIP has sent to `client` gets to the backend of a listener: by the same rules as
/// what the client sends. It may come from a router, so of its own source only a list of those who are kept out says
/// something.
///
/// # Errors
///
/// As [`admit`].
#[inline(always)]
pub fn admit_error<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    client: &Address,
    listener: &Listener,
) -> Result<(), L::Error> {
    let is_allowed_only = listener.flags.intersects(ListenerFlags::ALLOW);
    if is_allowed_only || listener.flags.intersects(ListenerFlags::DENY) {
        let is_listed = look.is_listed(listener.acl, client)?;
        look.step(Step::AccessList { listener, is_listed });
        let is_denied = is_listed != is_allowed_only
            || !is_allowed_only && look.is_listed(listener.acl, &packet.key.src)?;
        if is_denied {
            return Err(Verdict::Denied.into());
        }
    }
    if listener.flags.intersects(ListenerFlags::LIMITED) {
        look.police(listener.id, client, Limit::Bytes)?;
    }
    Ok(())
}

/// The generic cell rate algorithm (ITU-T I.371, annex A): until when a meter is paid, in nanoseconds, once something
/// that costs so many nanoseconds has passed by it. `paid` is until when it is paid now.
#[must_use]
#[inline(always)]
pub const fn paid_until(paid: u64, now: u64, cost: u64) -> u64 {
    (if paid > now { paid } else { now }).wrapping_add(cost)
}

/// Whether something that costs so many nanoseconds may pass by a meter that is paid until [`paid_until`] then, and may
/// be ahead by `burst`.
#[must_use]
#[inline(always)]
pub const fn conforms(until: u64, now: u64, cost: u64, burst: u64) -> bool {
    // What is ahead afterwards; a single one always fits.
    until.wrapping_sub(now) <= burst.wrapping_add(cost)
}
