//! Fragments other than the first: they go where that went.

use super::{Filtered, Lookups, Step, check_interfaces, check_source, check_ttl, unrelated};
use crate::{
    abi::{FlowKind, Fragment, Roles, TCP, UDP, is_over},
    packet::{FRAGMENT_NONE, Packet},
    verdict::Verdict,
};

/// The record that a later fragment goes by.
///
/// # Errors
///
/// A verdict: it goes no further.
#[inline(always)]
pub fn later<L: Lookups>(look: &mut L, packet: &Packet) -> Result<Fragment, L::Error> {
    let is_vip = look.roles(&packet.key.dst)?.intersects(Roles::VIP);
    if !matches!(packet.key.proto, TCP | UDP) && packet.is_v4() {
        return Err(unrelated(is_vip).into());
    }
    if is_vip {
        check_source(look, packet, Filtered::NOT)?;
    }
    let now = look.now();
    let known = look.first_fragment(packet)?.filter(|first| follows(now, packet, first));
    look.step(Step::FirstFragment(known.as_ref()));
    let Some(first) = known else {
        return Err(if is_vip { Verdict::Fragment } else { Verdict::NotOurs }.into());
    };
    if first.kind == FlowKind::Bypass as u32 {
        return Err(if is_vip { Verdict::NoListener } else { Verdict::NotOurs }.into());
    }
    check_interfaces(look, first.interfaces)?;
    check_ttl(look, first.hop)?;
    Ok(first)
}

/// Whether a fragment that comes now, in jiffies, belongs to this record's packet.
#[must_use]
#[inline(always)]
pub const fn follows(now: u32, packet: &Packet, first: &Fragment) -> bool {
    packet.fragment_id == first.id
        && packet.key.src.same(first.from)
        && !is_over(now, first.expires)
}

/// Whether a packet can be translated with both of its ends: nothing can be put into a fragment, nor can be told what
/// the others have; and there are no fragments between families. `inserted_len` is how many bytes the backend is to be
/// told.
#[must_use]
#[inline(always)]
pub const fn may_be_translated(packet: &Packet, inserted_len: u32, is_cross: bool) -> bool {
    inserted_len == 0 && !is_cross || packet.fragment == FRAGMENT_NONE
}
