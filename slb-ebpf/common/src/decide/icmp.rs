//! ICMP messages: which of them are answered, and whom errors concern.

use super::{
    Filtered, Limit, Lookups, Step, admit_error, by_schedule, check_address, check_backend,
    check_hop, check_source,
};
use crate::{
    abi::{
        Address, Backend, FlowKey, FlowKind, Mode, NO_BACKEND, NO_PLACE, NO_SOURCE, NatRewrite,
        RevNatFlags, Roles, SLOT_BACKEND,
    },
    packet::{FRAGMENT_NONE, Packet},
    verdict::Verdict,
};

/// Who has sent what an ICMP error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A VIP: [`error_to_backend`].
    Backend,
    /// A client: [`error_to_client`].
    Client,
}

/// Whom an ICMP error concerns. `quoted` is the key of the TCP or UDP packet that it is about.
///
/// # Errors
///
/// A verdict: it goes no further.
#[inline(always)]
pub fn concerns<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    quoted: &FlowKey,
) -> Result<Side, L::Error> {
    let is_vip = look.roles(&packet.key.dst)?.intersects(Roles::VIP);
    if is_vip {
        check_source(look, packet, Filtered::NOT)?;
    }
    // Errors go to who has sent what they are about.
    if packet.fragment != FRAGMENT_NONE || !packet.key.dst.same(quoted.src) {
        return Err(unrelated(is_vip).into());
    }
    Ok(if is_vip { Side::Backend } else { Side::Client })
}

/// Whether an ICMP message other than an error is one that the gateway may answer: an echo request to a VIP is.
///
/// # Errors
///
/// A verdict: it goes no further.
#[inline(always)]
pub fn to_itself<L: Lookups>(look: &mut L, packet: &Packet) -> Result<(), L::Error> {
    let is_vip = look.roles(&packet.key.dst)?.intersects(Roles::VIP);
    if is_vip {
        check_source(look, packet, Filtered::NOT)?;
    }
    if !is_vip || packet.fragment != FRAGMENT_NONE {
        return Err(unrelated(is_vip).into());
    }
    Ok(())
}

/// The verdict on a message that is about no flow of a listener, and on what has no ports; `is_vip`: its destination is
/// a VIP.
#[must_use]
#[inline(always)]
pub const fn unrelated(is_vip: bool) -> Verdict {
    if is_vip { Verdict::OtherProtocol } else { Verdict::NotOurs }
}

/// What an entry says of the flow of packets that are not the one that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its place in `SLB_FLOWS`.
    pub place: u32,
    /// [`crate::abi::Flow::backend`].
    pub backend: u32,
    /// [`crate::abi::Flow::port`].
    pub port: u16,
    /// [`crate::abi::Flow::source`].
    pub source: u16,
}

/// The backend that an error concerns.
pub struct ErrorToBackend<L: Lookups> {
    /// Its record.
    pub backend: L::Ref<Backend>,
    /// Its index.
    pub id: u32,
    /// The client's entry, or what stands for it: without an entry its place is [`NO_PLACE`].
    pub flow: Known,
}

/// An error, `packet`, about what a VIP has sent: its backend is to know. `quoted` is the key of that packet. The same
/// rules hold as for a packet of that flow's client.
///
/// # Errors
///
/// A verdict: it goes no further. [`Verdict::NotOurs`]: the packet was none of a listener's; [`unrelated`] says which
/// verdict that is.
#[inline(always)]
pub fn error_to_backend<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    quoted: &FlowKey,
) -> Result<ErrorToBackend<L>, L::Error> {
    let key = quoted.reversed();
    let listener = look.listener(&key.destination())?.ok_or(Verdict::NotOurs)?;
    look.step(Step::ErrorToBackend { key: &key });
    check_address(look, &key.src, packet.is_v4(), Filtered::NOT)?;
    admit_error(look, packet, &key.src, &listener)?;
    let hash = look.hash(&key, &listener.seed);
    let known = look.known(&key)?;
    let flow = match known {
        Some(known) => known,
        None => {
            let slot = by_schedule(look, &listener, &key, hash, false);
            let backend = slot.map_or(NO_BACKEND, |slot| slot & SLOT_BACKEND);
            Known { place: NO_PLACE, backend, port: key.sport, source: NO_SOURCE }
        }
    };
    if flow.backend == NO_BACKEND {
        return Err(Verdict::NotOurs.into());
    }
    let backend = look.backend(flow.backend)?.ok_or(Verdict::Inconsistent)?;
    check_hop(look, &backend)?;
    if backend.mode == Mode::FULL && flow.source == NO_SOURCE {
        return Err(Verdict::NotOurs.into());
    }
    Ok(ErrorToBackend { backend, id: flow.backend, flow })
}

/// The flow that a backend's answer belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// Place of its client's entry in `SLB_FLOWS`.
    pub place: u32,
    /// The key of its client's packets.
    pub key: FlowKey,
    /// [`crate::abi::Flow::backend`].
    pub backend: u32,
    /// [`crate::abi::Flow::source`].
    pub source: u16,
}

/// The client that an error concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorToClient {
    /// Index of the backend.
    pub backend: u32,
    /// Place of the client's entry, or [`NO_PLACE`].
    pub place: u32,
    /// What the quoted packet is to have: the VIP, and the ports that the client knows.
    pub to: NatRewrite,
    /// Who is to get the error.
    pub client: Address,
}

/// An error, `packet`, about what a client has sent to a backend. `quoted` is the key of that, as the backend gets it.
///
/// # Errors
///
/// As [`error_to_backend`].
#[inline(always)]
pub fn error_to_client<L: Lookups>(
    look: &mut L,
    packet: &Packet,
    quoted: &FlowKey,
) -> Result<ErrorToClient, L::Error> {
    let origin = look.revnat(&quoted.destination())?.ok_or(Verdict::NotOurs)?;
    look.step(Step::ErrorToClient { origin: &origin });
    check_backend(look, &origin)?;
    check_source(look, packet, Filtered::NOT)?;
    let kind = FlowKind::Reply;
    let (sport, dport) = (quoted.sport, origin.port as u16);
    let mut concerned = ErrorToClient {
        backend: origin.backend,
        place: NO_PLACE,
        to: NatRewrite { addr: origin.vip, sport, dport, kind },
        client: packet.key.dst,
    };
    match look.owner(quoted)? {
        Some(Owner { place, key, backend, source }) => {
            (concerned.backend, concerned.place) = (backend, place);
            concerned.to = NatRewrite { addr: key.dst, sport: key.sport, dport: key.dport, kind };
            if source != NO_SOURCE {
                concerned.client = key.src;
            }
        }
        None if origin.flags.intersects(RevNatFlags::SHARED) => return Err(Verdict::NotOurs.into()),
        None => {}
    }
    if origin.flags.intersects(RevNatFlags::LIMITED)
        && let Some(backend) = look.backend(concerned.backend)?
    {
        look.police(backend.listener.into(), &packet.key.src, Limit::Replies)?;
    }
    Ok(concerned)
}
