//! Keys, values and limits of the BPF maps.
//!
//! Everything here is `repr(C)` without implicit padding and made of integers and byte arrays only, which
//! `zerocopy`'s derives check, so that any bytes are a valid value and hash keys compare byte by byte. Addresses are bytes in
//! network order; all other numbers are in host order. `docs/maps.md` describes the maps themselves.

mod acl;
mod address;
mod backend;
mod counters;
mod flow;
mod fragment;
mod index;
mod interface;
mod limits;
mod listener;
mod next_hop;
mod quic;
mod revnat;
mod scratch;
mod seed;
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
pub use interface::*;
pub use limits::*;
pub use listener::*;
pub use next_hop::*;
pub use quic::*;
pub use revnat::*;
pub use scratch::*;
pub use seed::*;
pub use settings::*;
pub use slots::*;
pub use sticky::*;

/// Names the pin directory (`…/v1`). Changes with any layout in this module, so that an old map and a
/// new program never meet.
pub const ABI_VERSION: u32 = 10;

/// Lets values cross the system call boundary.
#[cfg(feature = "user")]
mod pod {
    use zerocopy::{FromBytes, Immutable, IntoBytes};

    use super::{
        AclCacheEntry, Address, Backend, Bucket, Chunk, ClientNextHop, Counter, Endpoint, Filter,
        Flow, FlowKey, Fragment, FragmentKey, Interface, Limits, Listener, OwnMac, Policers,
        QuicKey, RevNat, Roles, Scratch, Settings, SourcePolicer, Sticky, StickyKey, SynAnswers,
        Traffic,
    };
    use crate::bench::Template;

    const fn is_plain<T: FromBytes + Immutable + IntoBytes>() {}

    macro_rules! pod {
        ($($name:ident)*) => {$(
            const _: () = is_plain::<$name>();
            // SAFETY: any bytes are a valid value, and all of them are initialised: the line before checks it.
            unsafe impl aya::Pod for $name {}
        )*};
    }
    pod! { Endpoint Listener Chunk Backend Address Roles RevNat Interface FlowKey Flow Bucket }
    pod! { Settings Counter Traffic ClientNextHop Filter Scratch FragmentKey Fragment QuicKey }
    pod! { Limits Policers OwnMac SourcePolicer AclCacheEntry SynAnswers StickyKey Sticky Template }
}

#[cfg(test)]
mod tests;
