//! Counters. Per CPU, so that no write is shared.

use slb_common::verdict::Verdict;

use crate::{cell::Elements as _, maps};

/// A frame has ended in `verdict`.
#[inline(always)]
pub fn count(verdict: Verdict, bytes: u64) {
    if let Some(counter) = maps::SLB_VERDICTS.cell(verdict as u32) {
        counter.packets().add(1);
        counter.bytes().add(bytes);
    }
}

/// A frame goes to a backend.
#[inline(always)]
pub fn forward(backend: u32, bytes: u64) {
    if let Some(traffic) = maps::SLB_TRAFFIC.cell(backend) {
        traffic.packets().add(1);
        traffic.bytes().add(bytes);
    }
}

/// A frame comes from a backend.
#[inline(always)]
pub fn reply(backend: u32, bytes: u64) {
    if let Some(traffic) = maps::SLB_TRAFFIC.cell(backend) {
        traffic.reply_packets().add(1);
        traffic.reply_bytes().add(bytes);
    }
}

/// A backend was given a flow.
#[inline(always)]
pub fn new_flow(backend: u32) {
    if let Some(traffic) = maps::SLB_TRAFFIC.cell(backend) {
        traffic.flows().add(1);
    }
}
