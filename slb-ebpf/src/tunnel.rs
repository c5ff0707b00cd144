//! To backends behind a tunnel, which have the VIP as well and answer by themselves.

use aya_ebpf::helpers::bpf_xdp_adjust_head;
use slb_common::{
    abi::{MODE_GUE, MODE_IPIP, TCP},
    mss,
    parse::SYN,
    tunnel::{self, GUE_PORT, Tunnel},
    verdict::Verdict,
};

use crate::{
    maps,
    work::{self, Exit, Facts, Sent, Work},
};

/// Encapsulates the packet, which has a hop left: who has sent it here has seen to that.
#[inline(always)]
pub fn enter(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let backend = maps::backend(work.handover.backend).ok_or(Verdict::Inconsistent)?;
    // It may be another's by now.
    if !matches!(backend.mode, MODE_IPIP | MODE_GUE) || !backend.hop.is_known() {
        return Err(Verdict::NoNeighbour.into());
    }
    let settings = maps::settings();
    let tunnel = Tunnel {
        dst: backend.addr,
        src: if backend.addr.is_v4() { settings.tunnel_v4 } else { settings.tunnel_v6 },
        hop: backend.hop,
        hash: work.handover.hash,
        port: if backend.mode == MODE_GUE { GUE_PORT } else { 0 },
    };
    if work.packet.flags & SYN != 0 && work.packet.key.proto == TCP {
        clamp(&work.facts(), backend.mtu);
    }
    // SAFETY: the context is the kernel's; the frame is asked for afterwards.
    if unsafe { bpf_xdp_adjust_head(work.ctx.ctx, -(tunnel.overhead() as i32)) } != 0 {
        return Err(Verdict::Inconsistent.into());
    }
    tunnel::write(&mut work::frame(work.ctx), work.packet.is_v4(), &tunnel)?;
    Ok((Verdict::Forwarded, tunnel.hop.ifindex))
}

/// What fits through the tunnel is what the client's segments may have.
#[inline(never)]
fn clamp(facts: &Facts<'_>, mtu: u32) {
    let headers = if facts.packet.is_v4() { 40 } else { 60 };
    if mtu > headers {
        mss::clamp(&mut work::frame(facts.ctx), facts.packet, (mtu - headers) as u16);
    }
}
