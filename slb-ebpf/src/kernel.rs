//! The kernel's helpers.
//!
//! Those that resize a frame are safe to call: the verifier refuses a program that touches the frame afterwards by a
//! pointer from before. [`crate::ctx::frame`] gives the frame as it is then.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_fib_lookup,
    helpers::{
        self, bpf_get_prandom_u32, bpf_jiffies64, bpf_ktime_get_ns, bpf_redirect,
        bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len, bpf_xdp_load_bytes,
        bpf_xdp_store_bytes,
    },
    programs::XdpContext,
};
use slb_common::{
    abi::RouteQuery,
    proxy_protocol::{Head, OPTIONS_SIZE},
};

/// Low half of the jiffies: wraps, so only differences mean something.
#[inline(always)]
pub fn jiffies() -> u32 {
    // SAFETY: reads a counter of the kernel.
    unsafe { bpf_jiffies64() as u32 }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub fn nanoseconds() -> u64 {
    // SAFETY: reads a clock of the kernel.
    unsafe { bpf_ktime_get_ns() }
}

/// A random number.
#[inline(always)]
pub fn random() -> u32 {
    // SAFETY: touches no memory of ours.
    unsafe { bpf_get_prandom_u32() }
}

/// Index of the interface that a packet has come in by.
///
/// The verifier allows no pointer into the context but the one to its beginning, and the compiler makes one of two reads.
#[inline(always)]
pub fn ingress(xdp: &XdpContext) -> u32 {
    #[cfg(target_arch = "bpf")]
    {
        const { assert!(core::mem::offset_of!(aya_ebpf::bindings::xdp_md, ingress_ifindex) == 12) };
        let index: u64;
        // SAFETY: reads a field of the context, which is the kernel's.
        unsafe {
            core::arch::asm!(
                "{index} = *(u32 *)({context} + 12)",
                index = lateout(reg) index,
                context = in(reg) xdp.ctx,
                options(pure, readonly, nostack),
            );
        }
        index as u32
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        xdp.ingress_ifindex() as u32
    }
}

/// What a program returns that has its frame sent out of an interface.
#[inline(always)]
pub fn redirect(ifindex: u32) -> u32 {
    // SAFETY: touches no memory of ours.
    unsafe { bpf_redirect(ifindex, 0) as u32 }
}

/// Asks the kernel's routing tables, and gives one of `BPF_FIB_LKUP_RET_…`.
#[inline(always)]
pub fn fib_lookup(xdp: &XdpContext, query: &mut RouteQuery) -> u32 {
    const { assert!(size_of::<RouteQuery>() == size_of::<bpf_fib_lookup>()) };
    let len = size_of::<RouteQuery>() as i32;
    // SAFETY: the context is the kernel's, and the query is as long as it says.
    unsafe { helpers::bpf_fib_lookup(xdp.ctx.cast(), ptr::from_mut(query).cast(), len, 0) as u32 }
}

/// Length of a frame in bytes, all its buffers together.
#[inline(always)]
pub fn frame_len(xdp: &XdpContext) -> u64 {
    // SAFETY: the context is the kernel's.
    unsafe { bpf_xdp_get_buff_len(xdp.ctx) }
}

/// Moves the beginning of a frame by so many bytes: forth, or back if it is less than 0. `None`: there is no room.
#[inline(always)]
pub fn adjust_head(xdp: &XdpContext, by: i32) -> Option<()> {
    // SAFETY: the context is the kernel's, and of the frame see above.
    (unsafe { bpf_xdp_adjust_head(xdp.ctx, by) } == 0).then_some(())
}

/// Moves the end of a frame by so many bytes. `None`: there is no room.
#[inline(always)]
pub fn adjust_tail(xdp: &XdpContext, by: i32) -> Option<()> {
    // SAFETY: the context is the kernel's, and of the frame see above.
    (unsafe { bpf_xdp_adjust_tail(xdp.ctx, by) } == 0).then_some(())
}

/// What bytes of a frame are copied to and from: plain integers.
pub trait Buffer {}
impl Buffer for [u8; OPTIONS_SIZE] {}
impl Buffer for Head {}

/// Copies bytes of a frame, of all its buffers. `None`: they are not there, or there is no room.
#[inline(always)]
pub fn load_bytes<T: Buffer>(xdp: &XdpContext, offset: u32, to: &mut T, len: u32) -> Option<()> {
    if len as usize > size_of::<T>() {
        return None;
    }
    let to = ptr::from_mut(to).cast();
    // SAFETY: the context is the kernel's, and there is room for as much in integers.
    (unsafe { bpf_xdp_load_bytes(xdp.ctx, offset, to, len) } == 0).then_some(())
}

/// Copies bytes into a frame. `None`: it has no room for them.
#[inline(always)]
pub fn store_bytes<T: Buffer>(xdp: &XdpContext, offset: u32, from: &mut T, len: u32) -> Option<()> {
    if len as usize > size_of::<T>() {
        return None;
    }
    let from = ptr::from_mut(from).cast();
    // SAFETY: the context is the kernel's, and there is as much.
    (unsafe { bpf_xdp_store_bytes(xdp.ctx, offset, from, len) } == 0).then_some(())
}
