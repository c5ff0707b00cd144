//! Which backend a flow begins with where more than the listener's schedule says so: session persistence, the fewest
//! flows, or QUIC connection IDs.

use slb_common::{abi::UDP, decide, programs::Program, verdict::Verdict};

use crate::{
    ctx::PacketCtx,
    maps,
    outcome::{Next, Outcome},
};

/// Notes the choice for the program that makes the entries.
#[inline(always)]
pub fn choose(pkt: &mut PacketCtx<'_>) -> Outcome {
    let to = pkt.packet.key.destination();
    let listener = maps::listener(&to).ok_or(Verdict::NoListener)?;
    // What began before goes by what was the rule then.
    if pkt.packet.is_syn() || pkt.packet.key.proto == UDP {
        let hash = pkt.args.hash;
        pkt.args.chosen = decide::choose(pkt, pkt.packet, listener, hash)?;
    }
    Ok(Next::TailCall(Program::Flow))
}
