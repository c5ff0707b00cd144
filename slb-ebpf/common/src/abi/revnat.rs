//! `SLB_REVNAT`: which VIP a backend answers for.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::net::Address;

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
    /// [`REVNAT_SHARED`], [`REVNAT_TRACKED`], [`REVNAT_WATCHED`], [`REVNAT_CLOSING`] and [`REVNAT_LIMITED`].
    pub flags: u32,
    /// Zero.
    pub spare: u32,
}
const _: () = assert!(size_of::<RevNat>() == 32);
/// It answers for other VIPs or listeners, too: a flow's entry says for which.
pub const REVNAT_SHARED: u32 = 1;
/// Its flows have entries that want to know of SYN, FIN and RST.
pub const REVNAT_TRACKED: u32 = 2;
/// How it answers SYNs is counted, in `SLB_PASSIVE_HC`.
pub const REVNAT_WATCHED: u32 = 4;
/// Some of its connections are being reset.
pub const REVNAT_CLOSING: u32 = 8;
/// Its listener has limits, for answers as well.
pub const REVNAT_LIMITED: u32 = 16;
