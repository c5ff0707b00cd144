//! From clients to VIPs: what becomes of a packet by the decision about its backend ([`slb_common::decide`]).
//!
//! With a hash scheduler the slot of a packet's hash says it, and nothing is remembered. Only where
//! the slot says so, or flows are given out in turn, a flow has an entry.

use slb_common::{
    abi::{Endpoint, FlowKind, Mode, NOT_CHOSEN, NatRewrite, Task, UDP},
    decide::{self, Beginning, Course, Filtered},
    programs::Program,
    verdict::Verdict,
};

use crate::{
    ctx::PacketCtx,
    neigh,
    outcome::{Delivery, Stop, stop},
    stats,
};

/// A packet whose destination, `to`, may be a VIP.
///
/// `None`: it is not for a listener, nor is its destination a VIP.
#[inline(always)]
pub fn to_vip<const REST: bool>(
    pkt: &mut PacketCtx<'_>,
    to: &Endpoint,
    filtered: Filtered,
) -> Result<Option<Delivery>, Stop> {
    let course = match decide::to_vip(pkt, pkt.packet, to, filtered, REST) {
        Ok(course) => course,
        Err(verdict) => return Err(stop(pkt, verdict)),
    };
    match course {
        Course::Elsewhere => Ok(None),
        Course::Guarded => Err(Stop::TailCall(Program::Policy)),
        Course::Backend { id, port, hash, is_new } => {
            Ok(Some(to_backend::<REST>(pkt, Chosen { id, port, hash, is_new })?))
        }
        Course::OwnSource { hash } => {
            pkt.args.hash = hash;
            pkt.args.set_task(Task::Pass(FlowKind::Original));
            Err(Stop::TailCall(Program::FullNat))
        }
        Course::Begins { hash, chooses } => {
            pkt.args.hash = hash;
            pkt.args.set_task(Task::Pass(FlowKind::Original));
            pkt.args.chosen = NOT_CHOSEN;
            Err(Stop::TailCall(if chooses { Program::Scheduler } else { Program::Flow }))
        }
    }
}

/// A backend for a packet.
struct Chosen {
    id: u32,
    /// Source port towards it.
    port: u16,
    hash: u64,
    /// Whether a flow begins.
    is_new: bool,
}

/// How a packet gets to the backend that was chosen for it.
#[inline(always)]
fn to_backend<const REST: bool>(
    pkt: &mut PacketCtx<'_>,
    chosen: Chosen,
) -> Result<Delivery, Verdict> {
    let Chosen { id, port, hash, is_new } = chosen;
    let backend = decide::reach(pkt, id)?;
    if REST || backend.mode != Mode::NAT {
        (pkt.args.hash, pkt.args.backend) = (hash, id);
    }
    if pkt.packet.is_syn() || pkt.packet.key.proto == UDP {
        neigh::learn_client_neighbour(pkt);
        if is_new {
            stats::new_flow(id);
        }
    }
    stats::forward(id, pkt.arrived_bytes::<REST>());
    let kind = FlowKind::Original;
    let to = NatRewrite { addr: backend.addr, sport: port, dport: backend.port as u16, kind };
    Ok(Delivery { to, hop: backend.hop, mode: backend.mode, mtu: backend.mtu })
}

/// A packet to a VIP without an entry.
#[inline(always)]
pub fn begin(pkt: &mut PacketCtx<'_>) -> Result<Delivery, Stop> {
    let is_new = decide::begins(pkt.packet);
    let decided = decide::begin(pkt, pkt.packet, pkt.args.hash);
    // Read once more: less has to be kept on the stack meanwhile.
    let hash = pkt.args.hash;
    match decided {
        Ok(Beginning::Backend { id, port }) => {
            Ok(to_backend::<true>(pkt, Chosen { id, port, hash, is_new })?)
        }
        Ok(Beginning::OwnSource { id }) => {
            neigh::learn_client_neighbour(pkt);
            if is_new {
                stats::new_flow(id);
            }
            pkt.args.set_task(Task::Pass(FlowKind::Original));
            Err(Stop::TailCall(Program::FullNat))
        }
        Err(verdict) => Err(stop(pkt, verdict)),
    }
}
