//! Clients that talk to a backend's address and port themselves, through the gateway.
//!
//! Such packets are left alone. But a backend cannot tell such a connection from one of the same
//! client port through a listener, so its replies are remembered as [`FLOW_DIRECT`]: then a later
//! flow through a listener takes another port, and leftovers of an earlier one are not mistaken for
//! it.

use slb_common::{
    abi::{FIN_FORWARD, FLOW_DIRECT, UDP},
    verdict::Verdict,
};

use crate::{Work, flows, maps};

/// A packet to a backend's address that belongs to no known flow.
///
/// Gives the index of the backend if a flow begins here that is to be remembered; otherwise the
/// verdict, which leaves the packet alone.
#[inline(always)]
pub fn beginning(work: &Work<'_>) -> Result<u32, Verdict> {
    let key = &work.packet.key;
    // SAFETY: copied out at once.
    let endpoint =
        unsafe { maps::SLB_ENDPOINTS.get(key.destination()) }.copied().ok_or(Verdict::NotOurs)?;
    if let Some(known) = flows::find(&key.reversed())
        && known.kind == FLOW_DIRECT
    {
        if work.packet.is_syn() {
            known.state = 0;
        }
        flows::note_end(work, known, FIN_FORWARD);
        known.last_seen = work.now;
        return Err(Verdict::Direct);
    }
    let begins = key.proto == UDP || work.packet.is_syn();
    if begins { Ok(endpoint.backend) } else { Err(Verdict::Direct) }
}
