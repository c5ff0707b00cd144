//! Counters. Per CPU, so that no write is shared.

use slb_common::{
    abi::{Counter, Traffic},
    verdict::Verdict,
};

use crate::maps;

/// A frame has ended in `verdict`.
#[inline(always)]
pub fn count(verdict: Verdict, bytes: u64) {
    if let Some(counter) = maps::SLB_VERDICTS.get_ptr_mut(verdict as u32) {
        // SAFETY: this CPU's own copy, and a program is not interrupted by another on its CPU.
        let counter: &mut Counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += bytes;
    }
}

/// A frame goes to a backend.
#[inline(always)]
pub fn forward(backend: u32, bytes: u64) {
    if let Some(traffic) = traffic(backend) {
        traffic.packets += 1;
        traffic.bytes += bytes;
    }
}

/// A frame comes from a backend.
#[inline(always)]
pub fn reply(backend: u32, bytes: u64) {
    if let Some(traffic) = traffic(backend) {
        traffic.reply_packets += 1;
        traffic.reply_bytes += bytes;
    }
}

/// A backend was given a flow.
#[inline(always)]
pub fn new_flow(backend: u32) {
    if let Some(traffic) = traffic(backend) {
        traffic.flows += 1;
    }
}

#[inline(always)]
fn traffic(backend: u32) -> Option<&'static mut Traffic> {
    // SAFETY: this CPU's own copy, and a program is not interrupted by another on its CPU.
    maps::SLB_TRAFFIC.get_ptr_mut(backend).map(|traffic| unsafe { &mut *traffic })
}
