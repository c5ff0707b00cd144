//! What the gateway answers itself.

use aya_ebpf::{helpers::bpf_xdp_adjust_tail, programs::XdpContext};
use slb_common::{frame::Frame, reset, verdict::Verdict};

use crate::maps;

/// Makes the packet that was just parsed into the reset that answers it.
#[inline(never)]
pub fn reset(ctx: &XdpContext) -> Verdict {
    try_reset(ctx).unwrap_or(Verdict::NoFlow)
}

#[inline(always)]
fn try_reset(ctx: &XdpContext) -> Option<Verdict> {
    // SAFETY: the kernel vouches for `data..data_end` while the program runs.
    let mut frame = unsafe { Frame::from_raw(ctx.data() as *mut u8, ctx.data_end() as *mut u8) };
    let before = frame.len();
    let after = reset::write(&mut frame, maps::packet()?)?;
    // SAFETY: the context is the kernel's; nothing of the frame is touched afterwards.
    let cut = unsafe { bpf_xdp_adjust_tail(ctx.ctx, after as i32 - before as i32) };
    (cut == 0).then_some(Verdict::Reset)
}
