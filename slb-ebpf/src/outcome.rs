//! What the parts of the packet path decide. [`crate::exit`] carries it out.
//!
//! In all of them `Err` means that the packet ends here, with that verdict; `?` passes it on.

use slb_common::{
    abi::{Mode, NatRewrite, NextHop, Task},
    decide, icmp_error,
    programs::Program,
    rewrite,
    verdict::Verdict,
};

use crate::ctx::PacketCtx;

/// What a program returns.
pub type Outcome = Result<Next, Verdict>;

/// What happens to a packet that does not end here.
///
/// `repr(u32)` here and below: otherwise rustc hides the variant among the unused values of a [`Verdict`], and each
/// look at it costs more than one comparison.
#[repr(u32)]
pub enum Next {
    /// It is sent.
    Send { verdict: Verdict, egress: Egress },
    /// Another program goes on.
    TailCall(Program),
}

/// Index of the interface that a packet leaves through; 0: the kernel finds the next hop, and sends it.
pub type Egress = u32;

/// Why the program that looks at a packet does not deliver it itself.
#[repr(u32)]
pub enum Stop {
    /// The packet ends here.
    End(Verdict),
    /// Another program goes on.
    TailCall(Program),
}

impl From<Verdict> for Stop {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self::End(verdict)
    }
}

/// How a packet is rewritten, and where it goes.
pub struct Delivery {
    pub to: NatRewrite,
    pub hop: NextHop,
    pub mode: Mode,
    /// The longest packet that gets there, in bytes from its IP header on; 0: not known.
    pub mtu: u32,
}

/// Has the packet answered by the gateway; `verdict` is that of a packet for which that succeeds.
#[inline(always)]
pub const fn respond(pkt: &mut PacketCtx<'_>, verdict: Verdict) -> Program {
    pkt.args.set_task(Task::Answer(verdict));
    Program::Respond
}

/// Ends a packet by a verdict that was decided on. Some are those of packets that the gateway answers.
#[inline(always)]
pub const fn stop(pkt: &mut PacketCtx<'_>, verdict: Verdict) -> Stop {
    if decide::is_answered(verdict) {
        Stop::TailCall(respond(pkt, verdict))
    } else {
        Stop::End(verdict)
    }
}

/// Rewrites the frame as decided.
#[inline(always)]
pub fn deliver(pkt: &mut PacketCtx<'_>, delivery: Delivery) -> Outcome {
    let Delivery { to, mut hop, mode, mtu } = delivery;
    if exceeds(pkt.packet.len, mtu) {
        match too_big(pkt, mode, mtu)? {
            Some(other) => hop = other,
            None => return Ok(Next::TailCall(Program::Respond)),
        }
    }
    match mode {
        Mode::NAT => {
            rewrite::translate(&mut pkt.frame, pkt.packet, &to, hop)?;
            Ok(sent(to.is_reply(), hop))
        }
        Mode::DSR => {
            rewrite::rewrite_l2(&mut pkt.frame, pkt.packet, hop)?;
            Ok(Next::Send { verdict: Verdict::Forwarded, egress: hop.ifindex })
        }
        _ => Ok(Next::TailCall(Program::Tunnel)),
    }
}

/// What happens to a packet that is larger than `mtu`: its sender is told by [`Program::Respond`] (`None`), unless
/// it lets routers fragment what it sends (RFC 791). The kernel does.
#[inline(always)]
pub fn too_big(pkt: &mut PacketCtx<'_>, mode: Mode, mtu: u32) -> Result<Option<NextHop>, Verdict> {
    if icmp_error::is_to_be_told(&pkt.frame, pkt.packet) {
        pkt.args.mtu = mtu;
        respond(pkt, Verdict::TooBig);
        return Ok(None);
    }
    if mode == Mode::NAT { Ok(Some(NextHop::UNRESOLVED)) } else { Err(Verdict::Oversize) }
}

/// Whether a packet is longer than an MTU, of which 0 is none.
#[inline(always)]
pub const fn exceeds(len: u32, mtu: u32) -> bool {
    mtu.wrapping_sub(1) < len.wrapping_sub(1)
}

/// A translated packet goes to its next hop, or the kernel finds that.
#[inline(always)]
pub const fn sent(is_reply: bool, hop: NextHop) -> Next {
    Next::Send { verdict: decide::delivered(is_reply, hop.is_known()), egress: hop.ifindex }
}
