//! Where a packet comes from: whether its source may send it, and whether the interface is one that it can come by.
//!
//! This is what the kernel checks with `rp_filter = 1`, as far as it needs no route: the addresses and the subnets of
//! the gateway, and the way to each backend.

use super::{Filtered, Lookups, Step, is_martian};
use crate::{
    abi::{Address, RevNat, Roles},
    packet::Packet,
    verdict::Verdict,
};

/// Why an address cannot be the source of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Martian {
    /// It is no unicast address that a router forwards from.
    Address,
    /// It is the gateway's own, a VIP, or the broadcast address of a subnet.
    Own,
    /// It is on a subnet that is behind another interface.
    Subnet,
    /// It is that of a backend, which is behind another interface.
    Backend,
}

/// Whether a packet's source may be a client's, by the interface that it has come in by.
///
/// # Errors
///
/// [`Verdict::Martian`], or a map could not be read.
#[inline(always)]
pub fn check_source<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    filtered: Filtered,
) -> Result<(), L::Error> {
    check_address(look, &packet.key.src, packet.is_v4(), filtered)
}

/// The same of an address that a packet names.
///
/// # Errors
///
/// As above.
#[inline(always)]
pub fn check_address<L: Lookups>(
    look: &mut L,
    addr: &Address,
    is_v4: bool,
    filtered: Filtered,
) -> Result<(), L::Error> {
    let martian = if is_martian(addr, is_v4) {
        Martian::Address
    } else if !filtered.from.is_empty() && look.roles(addr)?.intersects(Roles::NO_SOURCE) {
        Martian::Own
    } else if filtered.is_elsewhere && is_elsewhere(look, addr)? {
        Martian::Subnet
    } else {
        return Ok(());
    };
    look.step(Step::Martian(martian));
    Err(Verdict::Martian.into())
}

/// Whether an address is on a subnet that is not behind the packet's interface.
#[inline(always)]
fn is_elsewhere<L: Lookups>(look: &L, addr: &Address) -> Result<bool, L::Error> {
    Ok(match look.subnet(addr)? {
        Some(interfaces) => interfaces & look.ingress_set()? == 0,
        None => false,
    })
}

/// Whether a packet can be one of a backend's, or an error from the way to it: by the interface that it has come in by.
///
/// # Errors
///
/// [`Verdict::Martian`], or a map could not be read.
#[inline(always)]
pub fn check_backend<L: Lookups>(look: &mut L, origin: &RevNat) -> Result<(), L::Error> {
    if origin.ingress == look.ingress() {
        return Ok(());
    }
    check_interfaces(look, origin.interfaces)
}

/// The same where the interfaces are known.
///
/// # Errors
///
/// As above.
#[inline(always)]
pub fn check_interfaces<L: Lookups>(look: &mut L, interfaces: u64) -> Result<(), L::Error> {
    if interfaces & look.ingress_set()? != 0 {
        return Ok(());
    }
    look.step(Step::Martian(Martian::Backend));
    Err(Verdict::Martian.into())
}
