//! The interface that a packet has come in by: whether the frame is to this host, and which VLANs are served.

use aya_ebpf::programs::XdpContext;
use slb_common::{
    abi::OwnMac,
    frame::{Frame, Header},
};

use crate::{kernel, maps};

/// Whether a frame's destination is a MAC address of this host. In promiscuous mode, and from a switch that floods,
/// XDP sees those of others as well.
#[inline(always)]
pub fn is_to_us(ctx: &XdpContext, frame: &Frame<'_>) -> bool {
    let Some(eth) = frame.header::<6>(0) else { return false };
    let mac = words(&eth);
    let ifindex = kernel::ingress(ctx);
    match maps::near(ifindex) {
        Some(interface) if interface.has_mac(mac) => true,
        _ => is_other_mac(ifindex, mac),
    }
}

/// A MAC address as [`OwnMac`] has it: four bytes, and two more.
#[inline(always)]
fn words(eth: &Header<'_, 6>) -> [u32; 2] {
    let [a, b] = eth.get::<u16>(4).to_ne_bytes();
    [eth.get(0), u32::from_ne_bytes([a, b, 0, 0])]
}

/// Whether a MAC address is the interface's own, which many share the place in `SLB_INGRESS` with, or another one of
/// this host. Without a record nothing is known of the interface: all frames are.
#[inline(never)]
fn is_other_mac(ifindex: u32, [high, low]: [u32; 2]) -> bool {
    let Some(interface) = maps::interface(ifindex) else { return true };
    if interface.mac == [0; 6] || interface.has_mac([high, low]) {
        return true;
    }
    maps::has_mac(&OwnMac::from_words([ifindex, high, low]))
}

/// Whether frames with these tags are served.
#[inline(always)]
pub fn is_served(tags: [u32; 2]) -> bool {
    tags.into_iter().all(|tag| tag == 0 || maps::serves_vlan(vlan(tag)))
}

/// The identifier in a tag, as it stands in the frame behind its EtherType.
#[inline(always)]
const fn vlan(tag: u32) -> u32 {
    u32::from_be(tag) & 0xfff
}
