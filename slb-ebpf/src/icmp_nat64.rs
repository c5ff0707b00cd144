//! ICMP errors whose flow is of another family than they are.

use slb_common::{
    abi::{FlowKind, NatTuple},
    icmp, icmp_nat64,
    verdict::Verdict,
};

use crate::{
    conntrack,
    ctx::PacketCtx,
    kernel, maps,
    outcome::{Outcome, sent},
};

/// Makes an error into one of the other family.
#[inline(always)]
pub fn translate(pkt: &mut PacketCtx<'_>) -> Outcome {
    let is_reply = pkt.args.is(FlowKind::Reply);
    let ends = maps::ends().ok_or(Verdict::Inconsistent)?;
    write_ends(ends, pkt.args.place, is_reply).ok_or(Verdict::Inconsistent)?;
    let quote = icmp::quote(&pkt.frame).ok_or(Verdict::Inconsistent)?;
    let mut error = icmp_nat64::read(&pkt.frame, &quote).ok_or(Verdict::Untranslatable)?;
    icmp_nat64::translate(&mut error, &quote.packet.key, ends);
    let after = icmp_nat64::frame_len(ends.src.is_v4());
    let before = pkt.bytes_left();
    pkt.adjust_tail(after as i32 - before as i32).ok_or(Verdict::Inconsistent)?;
    let hop = pkt.args.hop;
    let id = kernel::random() as u16;
    icmp_nat64::write(&mut pkt.frame, &error, ends, hop, id).ok_or(Verdict::Truncated)?;
    Ok(sent(is_reply, hop))
}

/// The ends of the packet that the error is about, as its sender has sent it: a client, or a backend if the
/// error is no reply.
#[inline(always)]
fn write_ends(ends: &mut NatTuple, place: u32, is_reply: bool) -> Option<()> {
    let flow = conntrack::get(place)?;
    if is_reply {
        (ends.src, ends.dst) = (flow.src().load(), flow.dst().load());
        (ends.sport, ends.dport) = (flow.sport().load(), flow.dport().load());
        return Some(());
    }
    let backend = maps::backend(flow.backend().load())?;
    (ends.src, ends.dst) = (backend.addr, maps::source(flow.source().load())?.load());
    (ends.sport, ends.dport) = (backend.port as u16, flow.port().load());
    Some(())
}
