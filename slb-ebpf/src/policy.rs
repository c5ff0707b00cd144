//! Who gets in: access lists, and limits of new flows and of bandwidth.

use core::{
    ptr,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::helpers::bpf_ktime_get_ns;
use slb_common::{
    abi::{
        Address, FLOW_BYPASS, LISTENER_GUARDED, Limits, MAX_ACL_CACHE, NO_BACKEND, Policers,
        REVNAT_LIMITED, ROLE_LOCAL,
    },
    decide, hash,
    programs::Program,
    verdict::Verdict,
};

use crate::{
    atomic, conntrack,
    ctx::PacketCtx,
    maps,
    outcome::{Next, Outcome},
};

/// Has what is admitted balanced.
#[inline(always)]
pub fn admit(pkt: &mut PacketCtx<'_>) -> Outcome {
    if let Some(listener) = maps::listener(&pkt.packet.key.destination()) {
        if listener.flags & LISTENER_GUARDED != 0 {
            decide::admit(pkt, pkt.packet, listener)?;
        }
    } else if let Some(origin) = maps::revnat(&pkt.packet.key.source())
        && origin.flags & REVNAT_LIMITED != 0
    {
        let key = &pkt.packet.key;
        let backend = match conntrack::slow_lookup(key) {
            Some(entry) if entry.kind == FLOW_BYPASS => NO_BACKEND,
            Some(entry) => entry.backend,
            // What a probe of the agent's is answered with is nobody's traffic.
            None if maps::roles(&key.dst) & ROLE_LOCAL != 0 => NO_BACKEND,
            None => origin.backend,
        };
        police_reply(backend, pkt.bytes)?;
    }
    Ok(Next::TailCall(Program::Reentry))
}

/// So many bytes come from a backend; [`NO_BACKEND`]: from nobody's.
#[inline(always)]
pub fn police_reply(backend: u32, bytes: u64) -> Result<(), Verdict> {
    let Some(backend) = maps::backend(backend) else { return Ok(()) };
    police(backend.listener.into(), bytes, |meters| &raw mut meters.reply)
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
    let index = hash::address(*addr) ^ acl as usize;
    let Some(known) = maps::SLB_ACL_CACHE.get_ptr_mut((index % MAX_ACL_CACHE) as u32) else {
        return maps::is_listed(acl, addr);
    };
    // SAFETY: an element of an array lives as long as the program; who writes to it has taken it.
    let known = unsafe { &mut *known };
    let now = maps::settings().acl_epoch;
    // Odd while somebody writes, and another one afterwards.
    // SAFETY: an aligned word.
    let write = unsafe { ptr::read_volatile(&raw const known.write) };
    compiler_fence(Ordering::Acquire);
    let is_it = known.addr.same(*addr) && known.acl == acl && known.epoch == now;
    let is_listed = known.is_listed != 0;
    compiler_fence(Ordering::Acquire);
    // SAFETY: as above.
    if is_it && write % 2 == 0 && unsafe { ptr::read_volatile(&raw const known.write) } == write {
        return is_listed;
    }
    let is_listed = maps::is_listed(acl, addr);
    if write % 2 != 0 {
        return is_listed;
    }
    // SAFETY: an aligned word of an array.
    if unsafe { atomic::compare_exchange(&raw mut known.write, write, write.wrapping_add(1)) } {
        known.addr = *addr;
        known.acl = acl;
        known.epoch = now;
        known.is_listed = is_listed.into();
        compiler_fence(Ordering::Release);
        // SAFETY: an aligned word.
        unsafe { ptr::write_volatile(&raw mut known.write, write.wrapping_add(2)) };
    }
    is_listed
}

/// A flow to a listener begins.
#[inline(always)]
pub fn police_flow(listener: u32) -> Result<(), Verdict> {
    let Some((limits, meters)) = limits(listener) else { return Ok(()) };
    if limits.flow_ns == 0 || conforms(&raw mut meters.flows, limits.flow_ns, limits.flow_burst) {
        return Ok(());
    }
    Err(Verdict::FlowLimit)
}

/// So many bytes go to a listener.
#[inline(always)]
pub fn police_bytes(listener: u32, bytes: u64) -> Result<(), Verdict> {
    police(listener, bytes, |meters| &raw mut meters.forward)
}

#[inline(always)]
fn police(
    listener: u32,
    bytes: u64,
    meter: impl Fn(&mut Policers) -> *mut u64,
) -> Result<(), Verdict> {
    let Some((limits, meters)) = limits(listener) else { return Ok(()) };
    if limits.byte_ns == 0 {
        return Ok(());
    }
    let cost = bytes.wrapping_mul(limits.byte_ns) >> 16;
    if conforms(meter(meters), cost, limits.byte_burst) {
        return Ok(());
    }
    Err(Verdict::BandwidthLimit)
}

#[inline(always)]
fn limits(listener: u32) -> Option<(&'static Limits, &'static mut Policers)> {
    let meters = maps::SLB_POLICERS.get_ptr_mut(listener)?;
    // SAFETY: an element of an array lives as long as the program; its words are exchanged, not written.
    Some((maps::SLB_LIMITS.get(listener)?, unsafe { &mut *meters }))
}

/// Whether something that costs so many nanoseconds may pass by a meter that may be ahead by `burst`, by
/// [`decide::conforms`]. All CPUs share the meter.
#[inline(always)]
fn conforms(meter: *mut u64, cost: u64, burst: u64) -> bool {
    /// A CPU that loses so often lets the packet pass.
    const ATTEMPTS: usize = 4;
    // SAFETY: reads a clock of the kernel.
    let now = unsafe { bpf_ktime_get_ns() };
    for _ in 0..ATTEMPTS {
        // SAFETY: an aligned word of an array.
        let paid = unsafe { ptr::read_volatile(meter) };
        let until = decide::paid_until(paid, now, cost);
        if !decide::conforms(until, now, cost, burst) {
            return false;
        }
        // SAFETY: as above.
        if unsafe { atomic::compare_exchange64(meter, paid, until) } {
            return true;
        }
    }
    true
}
