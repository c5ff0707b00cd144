//! Clients that talk to a backend's address and port themselves, through the gateway.
//!
//! Such packets are left alone. But a backend cannot tell such a connection from one of the same
//! client port through a listener, so its replies are remembered as [`FLOW_DIRECT`]: then a later
//! flow through a listener takes another port, and leftovers of an earlier one are not mistaken for
//! it.

use slb_common::{
    abi::{FIN_FORWARD, FLOW_DIRECT, Flow, Hop, UDP},
    verdict::Verdict,
};

use crate::{Work, flows, maps};

/// A packet to a backend's address that belongs to no known flow.
///
/// Nearly always ends in a verdict that leaves the packet alone. Gives the index of the backend if
/// that knows the client's port from a flow through a listener: then this one needs another port.
#[inline(always)]
pub fn conflict(work: &Work<'_>) -> Result<u32, Verdict> {
    let key = &work.packet.key;
    // SAFETY: copied out at once.
    let endpoint =
        unsafe { maps::SLB_ENDPOINTS.get(key.destination()) }.copied().ok_or(Verdict::NotOurs)?;
    let begins = key.proto == UDP || work.packet.is_syn();
    let reply_key = key.reversed();
    if let Some(known) = flows::find(&reply_key)
        && known.kind == FLOW_DIRECT
    {
        if work.packet.is_syn() {
            known.state = 0;
        }
        flows::note_end(work, known, FIN_FORWARD);
        known.last_seen = work.now;
    } else if begins {
        if !flows::claim(work, &reply_key) {
            return Ok(endpoint.backend);
        }
        let marker = Flow {
            addr: key.dst,
            sport: key.dport,
            dport: key.sport,
            backend: endpoint.backend,
            kind: FLOW_DIRECT,
            state: 0,
            last_seen: work.now,
            epoch: 0,
            hop: Hop::KERNEL,
        };
        // Not remembered is no reason not to pass it.
        let _ = flows::insert(&reply_key, &marker);
    }
    Err(Verdict::Direct)
}
