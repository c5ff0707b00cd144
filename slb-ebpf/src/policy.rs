//! Who gets in: access lists, and limits of new flows and of bandwidth.

use slb_common::{
    abi::{
        AclCacheEntry, Address, Limits, ListenerFlags, MAX_ACL_CACHE, NO_BACKEND, Policers,
        RevNatFlags, Roles, SourcePolicer,
    },
    decide, hash,
    programs::Program,
    verdict::Verdict,
};

use crate::{
    cell::{Elements as _, Guarded as _, Reading, SharedCell},
    conntrack,
    ctx::PacketCtx,
    kernel, maps,
    outcome::{Next, Outcome},
    route,
};

/// Has what is admitted balanced.
#[inline(always)]
pub fn admit(pkt: &mut PacketCtx<'_>) -> Outcome {
    if let Some(listener) = maps::listener(&pkt.packet.key.destination()) {
        if listener.flags.intersects(ListenerFlags::GUARDED) {
            // Packets of `slb_slow_path` have not been asked, and what no client can have sent costs no client anything.
            let known = maps::filter(&pkt.packet.key.src, &pkt.packet.key.dst);
            decide::check_source(pkt, pkt.packet, route::filtered(pkt, &known))?;
            decide::admit(pkt, pkt.packet, listener)?;
        }
    } else if let Some(origin) = maps::revnat(&pkt.packet.key.source())
        && origin.flags.intersects(RevNatFlags::LIMITED)
    {
        decide::check_backend(pkt, origin)?;
        let key = &pkt.packet.key;
        let backend = match conntrack::slow_lookup(key) {
            Some(entry) if conntrack::is_direct(pkt.now, entry) => NO_BACKEND,
            Some(entry) => entry.backend().load(),
            // Answers to the agent's probes belong to no listener's traffic.
            None if maps::roles(&key.dst).intersects(Roles::LOCAL) => NO_BACKEND,
            None => origin.backend,
        };
        police_reply(backend, pkt.bytes)?;
    }
    Ok(Next::TailCall(Program::Reentry))
}

/// Polices so many bytes from a backend; [`NO_BACKEND`]: from none of ours.
#[inline(always)]
pub fn police_reply(backend: u32, bytes: u64) -> Result<(), Verdict> {
    let Some(backend) = maps::backend(backend) else { return Ok(()) };
    police_replies(backend.listener.into(), bytes)
}

/// So many bytes go to a backend.
#[inline(always)]
pub fn police_original(backend: u32, bytes: u64) -> Result<(), Verdict> {
    let Some(backend) = maps::backend(backend) else { return Ok(()) };
    police_bytes(backend.listener.into(), bytes)
}

/// Whether a client is on an access list. The list is asked once per client.
#[inline(always)]
pub fn is_listed(acl: u32, addr: &Address) -> bool {
    // First, while nothing else is needed: it is a call.
    let now = maps::settings().acl_epoch();
    let index = hash::address(*addr) ^ acl as usize;
    let Some(known) = maps::SLB_ACL_CACHE.cell((index % MAX_ACL_CACHE) as u32) else {
        return maps::is_listed(acl, addr);
    };
    let Reading { guard, value: (is_it, is_listed), is_unchanged } = known.read(|known| {
        let is_it = known.addr().load().same(*addr)
            && known.acl().load() == acl
            && known.epoch().load() == now;
        (is_it, known.is_listed().load() != 0)
    });
    if is_it && is_unchanged && !AclCacheEntry::is_claimed(guard) {
        return is_listed;
    }
    let is_listed = maps::is_listed(acl, addr);
    if let Some(claim) = known.claim(guard) {
        let known = claim.cell();
        known.addr().store(*addr);
        known.acl().store(acl);
        known.epoch().store(now);
        known.is_listed().store(is_listed.into());
        claim.publish(guard.wrapping_add(2));
    }
    is_listed
}

/// A flow to a listener begins.
#[inline(always)]
pub fn police_flow(listener: u32) -> Result<(), Verdict> {
    let Some((limits, policers)) = limits(listener) else { return Ok(()) };
    let cost = limits.flow_ns().load();
    if cost == 0 || conforms(policers.flows(), cost, limits.flow_burst().load()) {
        return Ok(());
    }
    Err(Verdict::FlowLimit)
}

/// A flow of a source to a listener begins.
#[inline(always)]
pub fn police_source(listener: u32, source: &Address) -> Result<(), Verdict> {
    let Some(limits) = maps::SLB_LIMITS.cell(listener) else { return Ok(()) };
    let (cost, burst) = (limits.source_ns().load(), limits.source_burst().load());
    if cost == 0 {
        return Ok(());
    }
    let Some(settings) = maps::SLB_SETTINGS.cell(0) else { return Ok(()) };
    let hash = hash::source(*source, listener, settings.table_seed());
    let Some(policer) = maps::SLB_SRC_POLICER.cell(SourcePolicer::place(hash)) else {
        return Ok(());
    };
    let now = kernel::nanoseconds();
    let paid = policer.paid().load();
    let until = decide::paid_until(SourcePolicer { paid }.paid(hash), now, cost);
    if !decide::conforms(until, now, cost, burst) {
        return Err(Verdict::SourceLimit);
    }
    // A CPU that loses lets the packet pass.
    let _ = policer.paid().compare_exchange(paid, SourcePolicer::new(hash, until).paid);
    Ok(())
}

/// So many bytes go to a listener.
#[inline(always)]
pub fn police_bytes(listener: u32, bytes: u64) -> Result<(), Verdict> {
    police(listener, bytes, SharedCell::<Policers>::forward)
}

/// So many bytes come from a listener's backends.
#[inline(always)]
pub fn police_replies(listener: u32, bytes: u64) -> Result<(), Verdict> {
    police(listener, bytes, SharedCell::<Policers>::reply)
}

#[inline(always)]
fn police(
    listener: u32,
    bytes: u64,
    policer: impl Fn(SharedCell<Policers>) -> SharedCell<u64>,
) -> Result<(), Verdict> {
    let Some((limits, policers)) = limits(listener) else { return Ok(()) };
    let byte_ns = limits.byte_ns().load();
    if byte_ns == 0 {
        return Ok(());
    }
    let cost = bytes.wrapping_mul(byte_ns) >> 16;
    if conforms(policer(policers), cost, limits.byte_burst().load()) {
        return Ok(());
    }
    Err(Verdict::BandwidthLimit)
}

#[inline(always)]
fn limits(listener: u32) -> Option<(SharedCell<Limits>, SharedCell<Policers>)> {
    let policers = maps::SLB_POLICERS.cell(listener)?;
    Some((maps::SLB_LIMITS.cell(listener)?, policers))
}

/// Whether something that costs so many nanoseconds may pass by a policer that may be ahead by `burst`, by
/// [`decide::conforms`]. All CPUs share the policer.
#[inline(always)]
fn conforms(policer: SharedCell<u64>, cost: u64, burst: u64) -> bool {
    /// A CPU that loses so often lets the packet pass.
    const ATTEMPTS: usize = 4;
    let now = kernel::nanoseconds();
    for _ in 0..ATTEMPTS {
        let paid = policer.load();
        let until = decide::paid_until(paid, now, cost);
        if !decide::conforms(until, now, cost, burst) {
            return false;
        }
        if policer.compare_exchange(paid, until) {
            return true;
        }
    }
    true
}
