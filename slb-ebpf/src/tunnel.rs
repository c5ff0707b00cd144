//! To backends behind a tunnel, which have the VIP as well and answer by themselves.

use aya_ebpf::helpers::bpf_xdp_adjust_head;
use slb_common::{
    abi::{Address, Hop, MODE_GUE, MODE_IPIP, TCP},
    mss,
    parse::SYN,
    tunnel::{self, GUE_PORT, Tunnel},
    verdict::Verdict,
};

use crate::{
    maps,
    work::{self, Exit, Facts, Route, Sent, Work},
};

/// Whether the first program can encapsulate a packet itself: it is within the MTU, and there is nothing to clamp.
#[inline(always)]
pub fn is_short(work: &Work<'_>, route: &Route) -> bool {
    matches!(route.mode, MODE_IPIP | MODE_GUE)
        && work.packet.flags & SYN == 0
        && !work::exceeds(work.packet.len, route.mtu)
}

/// Encapsulates it.
#[inline(always)]
pub fn pass(work: &Work<'_>, route: &Route) -> Result<Sent, Exit> {
    wrap(work, route.mode, route.to.addr, route.hop)
}

#[inline(always)]
fn wrap(work: &Work<'_>, mode: u32, dst: Address, hop: Hop) -> Result<Sent, Exit> {
    let settings = maps::settings();
    let src = if dst.is_v4() { settings.tunnel_v4 } else { settings.tunnel_v6 };
    let port = if mode == MODE_GUE { GUE_PORT } else { 0 };
    let tunnel = Tunnel { dst, src, hop, hash: work.handover.hash, port };
    // SAFETY: the context is the kernel's; the frame is asked for afterwards.
    if unsafe { bpf_xdp_adjust_head(work.ctx.ctx, -(tunnel.overhead() as i32)) } != 0 {
        return Err(Verdict::Inconsistent.into());
    }
    tunnel::write(&mut work::frame(work.ctx), work.packet.is_v4(), &tunnel)?;
    Ok((Verdict::Forwarded, tunnel.hop.ifindex))
}

/// Encapsulates the packet, which has a hop left: who has sent it here has seen to that.
#[inline(always)]
pub fn enter(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let backend = maps::backend(work.handover.backend).ok_or(Verdict::Inconsistent)?;
    // It may be another's by now.
    if !matches!(backend.mode, MODE_IPIP | MODE_GUE) || !backend.hop.is_known() {
        return Err(Verdict::NoNeighbour.into());
    }
    if work.packet.flags & SYN != 0 && work.packet.key.proto == TCP {
        clamp(&work.facts(), backend.mtu);
    }
    wrap(work, backend.mode, backend.addr, backend.hop)
}

/// What fits through the tunnel is what the client's segments may have.
#[inline(never)]
fn clamp(facts: &Facts<'_>, mtu: u32) {
    let headers = if facts.packet.is_v4() { 40 } else { 60 };
    if mtu > headers {
        mss::clamp(&mut work::frame(facts.ctx), facts.packet, (mtu - headers) as u16);
    }
}
