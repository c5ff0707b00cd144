//! To backends behind a tunnel, which have the VIP as well and answer by themselves.

use slb_common::{
    abi::{Address, Mode, NextHop, TCP},
    decide, mss,
    parse::TcpFlags,
    tunnel::{self, GUE_PORT, Tunnel},
    verdict::Verdict,
};

use crate::{
    ctx::{self, PacketCtx, PacketView},
    kernel, maps,
    outcome::{Delivery, Next, Outcome, exceeds},
};

/// Whether the first program can encapsulate a packet itself: it is within the MTU, and there is nothing to clamp.
#[inline(always)]
pub fn is_short(pkt: &PacketCtx<'_>, delivery: &Delivery) -> bool {
    matches!(delivery.mode, Mode::IPIP | Mode::GUE)
        && !pkt.packet.flags.intersects(TcpFlags::SYN)
        && !exceeds(pkt.packet.len, delivery.mtu)
}

/// Encapsulates it.
#[inline(always)]
pub fn pass(pkt: &PacketCtx<'_>, delivery: &Delivery) -> Outcome {
    wrap(pkt, delivery.mode, delivery.to.addr, delivery.hop)
}

#[inline(always)]
fn wrap(pkt: &PacketCtx<'_>, mode: Mode, dst: Address, hop: NextHop) -> Outcome {
    let src = maps::tunnel_source(dst.is_v4()).ok_or(Verdict::Inconsistent)?;
    let port = if mode == Mode::GUE { GUE_PORT } else { 0 };
    let tunnel = Tunnel { dst, src, hop, hash: pkt.args.hash, port };
    let grown = kernel::adjust_head(pkt.ctx, -(tunnel.overhead() as i32));
    grown.ok_or(Verdict::Inconsistent)?;
    tunnel::write(&mut ctx::frame(pkt.ctx), pkt.packet.is_v4(), &tunnel)?;
    Ok(Next::Send { verdict: Verdict::Forwarded, egress: tunnel.hop.ifindex })
}

/// Encapsulates the packet, which has a hop left: who has sent it here has seen to that.
#[inline(always)]
pub fn enter(pkt: &mut PacketCtx<'_>) -> Outcome {
    let backend = maps::backend(pkt.args.backend).ok_or(Verdict::Inconsistent)?;
    // It may be another's by now.
    if !decide::may_be_encapsulated(backend) {
        return Err(Verdict::NoNeighbour);
    }
    if pkt.packet.flags.intersects(TcpFlags::SYN) && pkt.packet.key.proto == TCP {
        clamp(&pkt.view(), backend.mtu);
    }
    wrap(pkt, backend.mode, backend.addr, backend.hop)
}

/// What fits through the tunnel is what the client's segments may have.
#[inline(never)]
fn clamp(view: &PacketView<'_>, mtu: u32) {
    let headers = if view.packet.is_v4() { 40 } else { 60 };
    if mtu > headers {
        mss::clamp(&mut ctx::frame(view.ctx), view.packet, (mtu - headers) as u16);
    }
}
