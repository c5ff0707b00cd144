//! `SLB_REVNAT`: which VIP a backend answers for.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{flags::flags, net::Address};

/// Capacity of `SLB_ADDRESSES` and `SLB_REVNAT`.
pub const MAX_ENDPOINTS: usize = 65_536;

/// Value of `SLB_REVNAT`: where packets from a backend's address and port come from, in the eyes of
/// clients.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct RevNat {
    /// The VIP that it answers for.
    pub vip: Address,
    /// The listener's port.
    pub port: u32,
    /// Index into `SLB_BACKENDS`.
    pub backend: u32,
    /// What has to be known of what it answers.
    pub flags: RevNatFlags,
    /// Index of the interface that its packets come by; 0: `interfaces` says.
    pub ingress: u32,
    /// The interfaces that its packets come by: [`super::Interface::set`] of each.
    pub interfaces: u64,
}
const _: () = assert!(size_of::<RevNat>() == 40);

flags! {
    /// What has to be known of what a backend answers.
    pub struct RevNatFlags: u32 {
        /// It answers for other VIPs or listeners, too: a flow's entry says for which.
        const SHARED = 1;
        /// Its flows have entries that want to know of SYN, FIN and RST.
        const TRACKED = 2;
        /// How it answers SYNs is counted, in `SLB_PASSIVE_HC`.
        const WATCHED = 4;
        /// Some of its connections are being reset.
        const CLOSING = 8;
        /// Its listener has limits, for answers as well.
        const LIMITED = 16;
    }
}
