//! Keys, values and limits of the BPF maps.
//!
//! Everything here is `repr(C)` without implicit padding and made of integers and byte arrays only,
//! so that any bytes are a valid value and hash keys compare byte by byte. Addresses are bytes in
//! network order; all other numbers are in host order. `docs/maps.md` describes the maps themselves.

mod acl;
mod address;
mod backend;
mod counters;
mod flow;
mod fragment;
mod index;
mod limits;
mod listener;
mod next_hop;
mod quic;
mod revnat;
mod scratch;
mod settings;
mod slots;
mod sticky;

pub use crate::{net::*, packet::Packet};
pub use acl::*;
pub use address::*;
pub use backend::*;
pub use counters::*;
pub use flow::*;
pub use fragment::*;
pub use index::*;
pub use limits::*;
pub use listener::*;
pub use next_hop::*;
pub use quic::*;
pub use revnat::*;
pub use scratch::*;
pub use settings::*;
pub use slots::*;
pub use sticky::*;

/// Names the pin directory (`…/v1`). Changes with any layout in this module, so that an old map and a
/// new program never meet.
pub const ABI_VERSION: u32 = 7;

#[cfg(feature = "user")]
mod pod {
    macro_rules! pod {
        ($($name:ident)*) => {$(
            // SAFETY: `repr(C)`, `Copy`, no implicit padding, and any bytes are a valid value.
            unsafe impl aya::Pod for super::$name {}
        )*};
    }
    pod! { Endpoint Listener Chunk Backend Address Roles RevNat Interface FlowKey Flow Bucket }
    // SAFETY: as above, but for what fills a record's cache line, which nobody looks at.
    unsafe impl<V: aya::Pod, const RECORDS: usize> aya::Pod for super::Index<V, RECORDS> {}
    pod! { Settings Counter Traffic ClientNextHop Filter Packet Keys TailCallArgs Scratch }
    pod! { FragmentKey Fragment QuicKey Limits Policers AclCacheEntry SynAnswers StickyKey Sticky }
}

#[cfg(test)]
mod tests;
