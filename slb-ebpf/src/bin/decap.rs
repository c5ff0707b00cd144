//! The backend's side of `ipip` and `gue`: takes packets out of their tunnel before the kernel sees them.
//!
//! Without it a backend would need a tunnel device per kind and family; the kernel's own are slower, and
//! believe only tunnels whose other end they were told of.

#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the `xdp` macro drops the documentation of what it wraps")]
#![allow(unreachable_pub, reason = "no other crate can use the items of a program")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[path = "../cell.rs"]
#[allow(dead_code, unused_imports, unused_macros, reason = "shared with the packet path")]
mod cell;

use aya_ebpf::{
    bindings::xdp_action,
    btf_maps::PerCpuArray,
    helpers::bpf_xdp_adjust_head,
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use slb_common::{
    abi::{Counter, DECAP_DROPPED, DECAP_KINDS, DECAP_OPENED, DECAP_PASSED},
    frame::Frame,
    tunnel::{self, GUE_PORT},
};

use cell::{Elements as _, shared_fields};

shared_fields! { Counter { packets: u64, bytes: u64 } }

/// Written by the program, by what became of frames.
#[btf_map]
static SLB_DECAP: PerCpuArray<Counter, DECAP_KINDS> = PerCpuArray::new();

#[xdp(frags)]
pub fn slb_decap(ctx: XdpContext) -> u32 {
    // SAFETY: the kernel vouches for `data..data_end` until the frame is resized, which comes last.
    let mut frame = unsafe { Frame::from_raw(ctx.data() as *mut u8, ctx.data_end() as *mut u8) };
    let bytes = frame.len() as u64;
    let Some(decap) = tunnel::inner(&frame, GUE_PORT) else {
        count(DECAP_PASSED, bytes);
        return xdp_action::XDP_PASS;
    };
    let is_open = tunnel::unwrap(&mut frame, &decap).is_some()
        // SAFETY: the context is the kernel's; nothing of the frame is touched afterwards.
        && unsafe { bpf_xdp_adjust_head(ctx.ctx, decap.strip as i32) } == 0;
    count(if is_open { DECAP_OPENED } else { DECAP_DROPPED }, bytes);
    if is_open { xdp_action::XDP_PASS } else { xdp_action::XDP_DROP }
}

#[inline(always)]
fn count(kind: u32, bytes: u64) {
    if let Some(counter) = SLB_DECAP.cell(kind) {
        counter.packets().add(1);
        counter.bytes().add(bytes);
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
