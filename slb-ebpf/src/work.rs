//! A packet on its way through a program, and the ways out of it.

use aya_ebpf::{bindings::xdp_action, programs::XdpContext};
use slb_common::{
    abi::{
        Handover, Hop, MODE_DSR, MODE_NAT, STAGE_ANSWER, STAGE_CHOOSE, STAGE_FLOW, STAGE_FULL,
        STAGE_GUARD, STAGE_ICMP, STAGE_REST, STAGE_TUNNEL, Scratch, Translation,
    },
    frame::Frame,
    icmp_error,
    parse::{Packet, TAG_LEN},
    rewrite,
    verdict::{Action, Verdict},
};

use crate::{flows, hops, maps, stats, tags};

/// A frame on its way through a program.
pub struct Work<'a> {
    pub ctx: &'a XdpContext,
    pub frame: Frame<'a>,
    pub packet: &'a Packet,
    /// Where it is to be kept for others, if it is in registers.
    kept: Option<&'a mut Packet>,
    pub handover: &'a mut Handover,
    /// Length of the frame as it arrived, in bytes.
    pub bytes: u64,
    /// Low half of the jiffies.
    pub now: u32,
}

/// What a called function may know of a packet. A pointer to [`Work`] itself would force all of that out of
/// the registers.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    pub ctx: &'a XdpContext,
    pub packet: &'a Packet,
    /// Low half of the jiffies.
    pub now: u32,
}

/// What becomes of a packet to or from a backend.
pub struct Route {
    pub to: Translation,
    pub hop: Hop,
    /// [`MODE_NAT`] or another.
    pub mode: u32,
    /// The longest packet that gets there, in bytes from its IP header on; 0: not known.
    pub mtu: u32,
}

/// The verdict on a packet that is sent, and the interface that it leaves through; 0: the kernel sends it.
pub type Sent = (Verdict, u32);

/// How a packet leaves a program if it is not sent.
pub enum Exit {
    /// It ends here.
    Verdict(Verdict),
    /// Another program goes on: one of [`slb_common::abi::STAGES`].
    Stage(u32),
}

impl From<Verdict> for Exit {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self::Verdict(verdict)
    }
}

/// What the kernel has of a frame in its first buffer.
#[inline(always)]
pub fn frame(ctx: &XdpContext) -> Frame<'_> {
    // SAFETY: the kernel vouches for `data..data_end` until the frame is resized; whoever does that
    // asks for it again.
    unsafe { Frame::from_raw(ctx.data() as *mut u8, ctx.data_end() as *mut u8) }
}

impl<'a> Work<'a> {
    /// The first program's. `packet` is the one in the map, or one to which nobody else has a pointer: others
    /// find it where it is `kept`.
    #[inline(always)]
    pub fn begin(
        ctx: &'a XdpContext,
        packet: &'a Packet,
        kept: Option<&'a mut Packet>,
        handover: &'a mut Handover,
    ) -> Self {
        let frame = frame(ctx);
        let bytes = frame.len() as u64;
        Self { ctx, frame, packet, kept, handover, bytes, now: flows::now() }
    }

    /// That of a program behind it.
    #[inline(always)]
    pub fn go_on(ctx: &'a XdpContext, scratch: &'a mut Scratch) -> Self {
        let Scratch { packet, handover, .. } = scratch;
        let bytes = handover.bytes;
        Self { bytes, ..Self::begin(ctx, packet, None, handover) }
    }

    /// For a function that is called.
    #[inline(always)]
    pub const fn facts(&mut self) -> Facts<'_> {
        self.keep();
        let packet = match &self.kept {
            Some(kept) => kept,
            None => self.packet,
        };
        Facts { ctx: self.ctx, packet, now: self.now }
    }

    /// Puts the packet where others find it.
    #[inline(always)]
    pub const fn keep(&mut self) {
        if let Some(kept) = &mut self.kept {
            self.packet.copy_to(kept);
        }
    }

    /// Length of the frame as it is now, tags taken off, in bytes.
    #[inline(always)]
    pub const fn bytes_left(&self) -> u64 {
        let [outer, inner] = self.handover.tags;
        let tags = (outer != 0) as u64 + (inner != 0) as u64;
        self.bytes.wrapping_sub(tags * TAG_LEN as u64)
    }

    /// Whether the packet may not be sent any further. The kernel sees for itself.
    #[inline(always)]
    pub fn expires(&self, hop: Hop) -> bool {
        hop.is_known() && rewrite::expires(&self.frame, self.packet)
    }

    /// Has the packet answered; `verdict` is that on a packet for which that works.
    #[inline(always)]
    pub fn answer(&mut self, verdict: Verdict) -> Exit {
        self.handover.what = verdict as u32;
        Exit::Stage(STAGE_ANSWER)
    }

    /// Writes what was decided into the frame.
    #[inline(always)]
    pub fn send(&mut self, route: Route) -> Result<Sent, Exit> {
        let Route { to, mut hop, mode, mtu } = route;
        if exceeds(self.packet.len, mtu) {
            hop = self.too_big(mode, mtu)?;
        }
        match mode {
            MODE_NAT => {
                rewrite::translate(&mut self.frame, self.packet, &to, hop)?;
                Ok(sent(to.is_reply(), hop))
            }
            MODE_DSR => {
                rewrite::pass_on(&mut self.frame, self.packet, hop)?;
                Ok((Verdict::Forwarded, hop.ifindex))
            }
            _ => Err(Exit::Stage(STAGE_TUNNEL)),
        }
    }

    /// What becomes of a packet that is larger than `mtu`: its sender is told, unless it lets routers
    /// fragment what it sends (RFC 791). The kernel does.
    #[inline(always)]
    pub fn too_big(&mut self, mode: u32, mtu: u32) -> Result<Hop, Exit> {
        if icmp_error::is_to_be_told(&self.frame, self.packet) {
            self.handover.mtu = mtu;
            return Err(self.answer(Verdict::TooBig));
        }
        if mode == MODE_NAT { Ok(Hop::KERNEL) } else { Err(Verdict::Oversize.into()) }
    }
}

/// Whether a packet is longer than an MTU, of which 0 is none.
#[inline(always)]
pub const fn exceeds(len: u32, mtu: u32) -> bool {
    mtu.wrapping_sub(1) < len.wrapping_sub(1)
}

/// The verdict on a translated packet.
#[inline(always)]
pub const fn sent(is_reply: bool, hop: Hop) -> Sent {
    let verdict = match (is_reply, hop.is_known()) {
        (false, true) => Verdict::Forwarded,
        (true, true) => Verdict::Replied,
        (false, false) => Verdict::ForwardedByKernel,
        (true, false) => Verdict::RepliedByKernel,
    };
    (verdict, hop.ifindex)
}

/// The end of the first program. `bytes` is the frame's length.
#[inline(always)]
pub fn leave(ctx: &XdpContext, outcome: Result<Sent, Exit>, bytes: u64) -> u32 {
    let (verdict, ifindex) = match outcome {
        Ok(sent) => sent,
        Err(Exit::Verdict(verdict)) => (verdict, 0),
        Err(Exit::Stage(stage)) => {
            if let Some(scratch) = maps::scratch() {
                (scratch.handover.bytes, scratch.handover.tags) = (bytes, [0; 2]);
            }
            match stage {
                STAGE_ICMP => go_to::<STAGE_ICMP>(ctx),
                STAGE_REST => go_to::<STAGE_REST>(ctx),
                STAGE_FLOW => go_to::<STAGE_FLOW>(ctx),
                STAGE_TUNNEL => go_to::<STAGE_TUNNEL>(ctx),
                STAGE_FULL => go_to::<STAGE_FULL>(ctx),
                STAGE_ANSWER => go_to::<STAGE_ANSWER>(ctx),
                STAGE_GUARD => go_to::<STAGE_GUARD>(ctx),
                STAGE_CHOOSE => go_to::<STAGE_CHOOSE>(ctx),
                // Only from other stages.
                _ => {}
            }
            (Verdict::Inconsistent, 0)
        }
    };
    end(ctx, verdict, ifindex, bytes)
}

/// To a stage whose number the kernel knows when it translates the program: such a tail call is a jump, others are a
/// look-up and an indirect one with its guards, which takes 25 ns more.
#[inline(always)]
fn go_to<const STAGE: u32>(ctx: &XdpContext) {
    // SAFETY: nothing here is needed afterwards.
    unsafe { maps::SLB_STAGES.tail_call(ctx, STAGE) };
    // Keeps the compiler from making one call of several.
    // SAFETY: does nothing.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!("");
    }
}

/// A program behind it: does its part with the packet that it was left, and ends.
#[inline(always)]
pub fn go_on(ctx: &XdpContext, part: impl FnOnce(&mut Work<'_>) -> Result<Sent, Exit>) -> u32 {
    stage(ctx, |scratch| part(&mut Work::go_on(ctx, scratch)))
}

/// A program behind the first: does its part, and ends.
#[inline(always)]
pub fn stage(ctx: &XdpContext, part: impl FnOnce(&mut Scratch) -> Result<Sent, Exit>) -> u32 {
    let Some(scratch) = maps::scratch() else { return xdp_action::XDP_ABORTED };
    let (mut verdict, ifindex) = match part(scratch) {
        Ok(sent) => sent,
        Err(Exit::Verdict(verdict)) => (verdict, 0),
        Err(Exit::Stage(stage)) => {
            // SAFETY: nothing here is needed afterwards.
            unsafe { maps::SLB_STAGES.tail_call(ctx, stage) };
            (Verdict::Inconsistent, 0)
        }
    };
    if !matches!(verdict.action(), Action::Drop) && tags::put(ctx, scratch.handover.tags).is_none()
    {
        verdict = Verdict::Inconsistent;
    }
    end(ctx, verdict, ifindex, scratch.handover.bytes)
}

/// The single exit: every frame is counted once.
#[inline(always)]
fn end(ctx: &XdpContext, verdict: Verdict, ifindex: u32, bytes: u64) -> u32 {
    stats::count(verdict, bytes);
    #[cfg(feature = "trace")]
    aya_log_ebpf::info!(ctx, "{} bytes: {}", bytes, verdict.label());
    if ifindex != 0 {
        return hops::transmit(ctx, ifindex);
    }
    match verdict.action() {
        Action::Drop => xdp_action::XDP_DROP,
        Action::Pass | Action::Transmit => xdp_action::XDP_PASS,
    }
}
