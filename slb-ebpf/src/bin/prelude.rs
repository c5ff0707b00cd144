//! For `cargo xtask bench`: runs before the program that is timed, and puts the frame back.
//!
//! `BPF_PROG_TEST_RUN` gives every repeat the frame that the one before has left: translated, resized,
//! for nobody any more. So each repeat begins here. The head and the tail are moved back, the headers
//! written again, for another flow each time if that is asked for, and then the program is called.
//! [`stub`] behind the same prelude costs what has to be taken off.

#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the `xdp` macro drops the documentation of what it wraps")]
#![allow(unreachable_pub, reason = "no other crate can use the items of a program")]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[path = "../cell.rs"]
#[allow(dead_code, unused_imports, unused_macros, reason = "shared with the packet path")]
mod cell;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, xdp_action},
    btf_maps::{Array, LruHashMap, PerCpuArray, ProgramArray},
    helpers::{bpf_fib_lookup, bpf_redirect, bpf_xdp_adjust_head, bpf_xdp_adjust_tail},
    macros::{btf_map, xdp},
    programs::XdpContext,
};
use cell::Elements as _;
use slb_common::{
    abi::{CHUNK_SLOTS, FlowKey},
    bench::{HEADER_BYTES, Template},
    checksum,
    frame::Frame,
    hash,
};

/// What frames look like, and which flow is next.
#[btf_map]
static TEMPLATE: Array<Template, 1> = Array::new();

/// The program that is timed.
#[btf_map]
static TARGET: ProgramArray<1> = ProgramArray::new();

/// Counts, so that there is something to lock.
#[btf_map]
static FENCE: Array<u64, 1> = Array::new();

/// What a flow table made of the kernel's maps would cost: for [`lru`].
#[btf_map]
static LRU: LruHashMap<FlowKey, u64, 2_097_152> = LruHashMap::new();

/// Entries of [`RECORDS`] and [`COUNTERS`].
const MAX_BACKENDS: usize = 16_384;

/// What any balancer by hash has to look at, as dense as it gets: for [`chain`]. All zero.
#[btf_map]
static SLOTS: Array<[u32; CHUNK_SLOTS], 1_024> = Array::new();
/// A cache line each.
#[btf_map]
static RECORDS: Array<[u64; 8], MAX_BACKENDS, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static COUNTERS: PerCpuArray<[u64; 2], MAX_BACKENDS> = PerCpuArray::new();

#[inline(always)]
fn frame(ctx: &XdpContext) -> Frame<'_> {
    // SAFETY: the kernel vouches for `data..data_end` until the frame is resized; it is asked for again
    // then.
    unsafe { Frame::from_raw(ctx.data() as *mut u8, ctx.data_end() as *mut u8) }
}

#[xdp(frags)]
pub fn prelude(ctx: XdpContext) -> u32 {
    if restore(&ctx).is_some()
        && let Some(fence) = FENCE.cell(0)
    {
        // A locked instruction: from here on the headers are in the cache, as they are when a driver
        // hands over a frame, and not in the CPU's store buffer, from which not every load can be served.
        fence.fetch_add(1);
        // SAFETY: nothing here is needed afterwards.
        unsafe { TARGET.tail_call(&ctx, 0) };
    }
    xdp_action::XDP_ABORTED
}

#[inline(always)]
fn restore(ctx: &XdpContext) -> Option<()> {
    let template = TEMPLATE.get_ptr_mut(0)?;
    // SAFETY: an element of an array; no other CPU runs this program at the same time.
    let template = unsafe { &mut *template };
    if template.grown != 0 && template.has_run != 0 {
        // SAFETY: the context is the kernel's; the frame is asked for afterwards.
        if unsafe { bpf_xdp_adjust_head(ctx.ctx, template.grown) } != 0 {
            return None;
        }
    }
    template.has_run = 1;
    let missing = template.len as i32 - frame(ctx).len() as i32;
    if missing != 0 {
        // SAFETY: as above.
        if unsafe { bpf_xdp_adjust_tail(ctx.ctx, missing) } != 0 {
            return None;
        }
    }
    let mut frame = frame(ctx);
    let mut head = frame.header_mut::<HEADER_BYTES>(0)?;
    for (at, word) in template.words.iter().enumerate() {
        head.set(8 * at, *word);
    }
    if template.flows > 1 {
        let flow = template.next;
        template.next = if flow + 1 >= template.flows { 0 } else { flow + 1 };
        let ports = template.ports.max(1);
        let port = ((template.first_port + flow % ports) as u16).to_be();
        let addr = template.first_addr.wrapping_add(flow / ports).to_be();
        // Constants to the verifier.
        match template.addr_at {
            26 => head.set(26, addr),
            30 => head.set(30, addr),
            34 => head.set(34, addr),
            _ => head.set(50, addr),
        }
        match template.port_at {
            34 => head.set(34, port),
            36 => head.set(36, port),
            54 => head.set(54, port),
            _ => head.set(56, port),
        }
        if template.is_v4 != 0 {
            head.set(24, !checksum::fold(u64::from(template.sum) + u64::from(addr)));
        }
    }
    Some(())
}

/// Does nothing but to grow the frame as the program does: what is left is the prelude.
#[xdp(frags)]
pub fn stub(ctx: XdpContext) -> u32 {
    let grown = TEMPLATE.get(0).map_or(0, |template| template.grown);
    // SAFETY: the context is the kernel's; nothing of the frame is touched afterwards.
    if grown != 0 && unsafe { bpf_xdp_adjust_head(ctx.ctx, -grown) } != 0 {
        return xdp_action::XDP_ABORTED;
    }
    xdp_action::XDP_TX
}

/// What every frame that is sent takes: a redirect.
#[xdp(frags)]
pub fn redirect(_: XdpContext) -> u32 {
    let Some(template) = TEMPLATE.get(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: numbers only.
    unsafe { bpf_redirect(template.ifindex, 0) as u32 }
}

/// Where live frames end.
#[xdp(frags)]
pub fn sink(_: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

/// One look-up in an LRU hash of the kernel, with the key of a flow; makes what is not there.
#[xdp(frags)]
pub fn lru(ctx: XdpContext) -> u32 {
    let frame = frame(&ctx);
    let Some(head) = frame.header::<HEADER_BYTES>(0) else { return xdp_action::XDP_ABORTED };
    let mut key = FlowKey::default();
    key.src.bytes = (u128::from(head.get::<u32>(26))).to_be_bytes();
    key.dst.bytes = (u128::from(head.get::<u32>(30))).to_be_bytes();
    (key.sport, key.dport) = (head.get(34), head.get(36));
    // SAFETY: copied out at once.
    if unsafe { LRU.get(key) }.is_none() {
        let _ = LRU.insert(key, 1, 0);
    }
    xdp_action::XDP_TX
}

/// A slot by hash, the record that it names, and that one's counter: what a packet costs without the rest.
#[xdp(frags)]
pub fn chain(ctx: XdpContext) -> u32 {
    if choose(&ctx).is_some() { xdp_action::XDP_TX } else { xdp_action::XDP_ABORTED }
}

#[inline(always)]
fn choose(ctx: &XdpContext) -> Option<()> {
    let template = TEMPLATE.get(0)?;
    let mut frame = frame(ctx);
    let mut head = frame.header_mut::<HEADER_BYTES>(0)?;
    let hash = hash::bytes(u64::from(head.get::<u32>(26)) << 32 | u64::from(head.get::<u32>(34)));
    let at = hash::slot(hash::choice(hash), template.slots);
    let slot = SLOTS.get(at / CHUNK_SLOTS as u32)?[at as usize % CHUNK_SLOTS];
    // The slots are all the same, but that is not known before they are there.
    let id = hash::slot(hash as u32 ^ slot, template.backends);
    head.set(30, RECORDS.get(id)?[0] as u32);
    let counter = COUNTERS.get_ptr_mut(id)?;
    // SAFETY: this CPU's own copy.
    unsafe { (*counter)[0] += 1 };
    Some(())
}

/// One look-up in the kernel's routes.
#[xdp(frags)]
pub fn fib(ctx: XdpContext) -> u32 {
    let frame = frame(&ctx);
    let Some(head) = frame.header::<HEADER_BYTES>(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: integers and unions of integers only.
    let mut query: aya_ebpf::bindings::bpf_fib_lookup = unsafe { core::mem::zeroed() };
    query.family = 2;
    query.ifindex = ctx.ingress_ifindex() as u32;
    query.__bindgen_anon_3.ipv4_src = head.get(30);
    query.__bindgen_anon_4.ipv4_dst = head.get(26);
    // SAFETY: the context is the kernel's, and the query is as long as it says.
    let answer = unsafe {
        bpf_fib_lookup(
            ctx.ctx.cast(),
            core::ptr::from_mut(&mut query).cast(),
            size_of_val(&query) as i32,
            0,
        )
    };
    if answer == 0 { xdp_action::XDP_TX } else { xdp_action::XDP_PASS }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
