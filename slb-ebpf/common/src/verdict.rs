//! Every way in which a packet can leave the program.
//!
//! One row is the variant, the slot of its counter, the XDP action and the label in metrics, so none
//! of them can drift from the others. Slots are append-only: a counter keeps its meaning across
//! upgrades.

/// What the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Out of an interface, by `XDP_TX` or `XDP_REDIRECT`.
    Transmit,
    /// On to the kernel's own stack.
    Pass,
    /// Freed.
    Drop,
}

macro_rules! verdicts {
    ($($(#[doc = $doc:literal])+ $name:ident = $slot:literal, $action:ident, $label:literal;)+) => {
        /// What became of a packet.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Verdict {
            $($(#[doc = $doc])+ $name = $slot,)+
        }

        impl Verdict {
            /// All of them, in the order of their slots.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// What the driver is told.
            #[must_use]
            #[inline(always)]
            pub const fn action(self) -> Action {
                match self { $(Self::$name => Action::$action,)+ }
            }

            /// From the slot of its counter: a number that went through a register.
            #[must_use]
            #[inline(always)]
            pub const fn from_slot(slot: u32) -> Self {
                match slot { $($slot => Self::$name,)+ _ => Self::Inconsistent }
            }

            /// Name in metrics and in `slb status`.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }
        }
    };
}

verdicts! {
    /// To a backend.
    Forwarded = 0, Transmit, "forwarded";
    /// From a backend to a client.
    Replied = 1, Transmit, "replied";
    /// Addressed to a backend, then left to the kernel: the next hop is not known yet.
    ForwardedByKernel = 2, Pass, "forwarded_by_kernel";
    /// Addressed to a client, then left to the kernel: the next hop is not known yet.
    RepliedByKernel = 3, Pass, "replied_by_kernel";
    /// Neither to nor from a listener.
    NotOurs = 4, Pass, "not_ours";
    /// Between a client and a backend without a listener.
    Bypass = 5, Pass, "bypass";
    /// To a VIP, on a port without a listener.
    NoListener = 6, Pass, "no_listener";
    /// To a VIP, but neither TCP nor UDP.
    OtherProtocol = 7, Pass, "other_protocol";
    /// No backend of the listener takes new flows.
    NoBackend = 8, Drop, "no_backend";
    /// TCP in the middle of a connection that is not known, on a listener that takes turns, and no
    /// reset can answer it.
    NoFlow = 9, Drop, "no_flow";
    /// To a VIP, and shorter than its headers say.
    Truncated = 10, Drop, "truncated";
    /// To a VIP, and its headers contradict themselves.
    Malformed = 11, Drop, "malformed";
    /// To a VIP, with a wrong IPv4 header checksum.
    BadChecksum = 12, Drop, "bad_checksum";
    /// To a VIP, and a fragment whose first one has not been seen.
    Fragment = 13, Drop, "fragment";
    /// Its TTL or hop limit ends here.
    TtlExpired = 14, Drop, "ttl_expired";
    /// From where it cannot come: to a VIP from one of the gateway's addresses, from a subnet behind another interface, from
    /// 0/8, 127/8, 169.254/16, 224/4, 255.255.255.255, ::, ::1, fe80::/10 or ff00::/8, or with a source route; or an answer
    /// or an error by an interface that the backend is not behind.
    Martian = 15, Drop, "martian";
    /// The kernel has no route to the client, or one that forbids it.
    NoRoute = 16, Drop, "no_route";
    /// The backend knows the client's port from another flow, and no free one was found.
    NoPort = 17, Drop, "no_port";
    /// The flow could not be remembered.
    TableFull = 18, Drop, "table_full";
    /// The maps contradict each other: a bug.
    Inconsistent = 19, Drop, "inconsistent";
    /// The way to the backend is not known, and the kernel cannot send there: it has the VIP itself.
    NoNeighbour = 20, Drop, "no_neighbour";
    /// As [`Verdict::NoFlow`], and answered with a reset.
    Reset = 21, Transmit, "reset";
    /// An echo request to a VIP, answered.
    Echo = 22, Transmit, "echo";
    /// Larger than the next hop takes, and its sender was told by ICMP.
    TooBig = 23, Transmit, "too_big";
    /// Larger than the next hop takes; its sender lets it be fragmented, which XDP cannot do.
    Oversize = 24, Drop, "oversize";
    /// As [`Verdict::NoListener`], and dropped, as `no_listener` asks for.
    NoListenerDropped = 25, Drop, "no_listener_dropped";
    /// As [`Verdict::NoListener`], and refused by a reset or by ICMP, as `no_listener` asks for.
    Refused = 26, Transmit, "refused";
    /// A fragment or a datagram without a checksum between IPv4 and IPv6, a fragment where the backend is to be told the
    /// client's address, or an ICMP error that the other family has no word for.
    Untranslatable = 27, Drop, "untranslatable";
    /// The listener's access list keeps its client out.
    Denied = 28, Drop, "denied";
    /// More new flows than the listener may take.
    FlowLimit = 29, Drop, "flow_limit";
    /// More bytes than the listener may take.
    BandwidthLimit = 30, Drop, "bandwidth_limit";
    /// Of a connection that was idle for too long, or whose backend is drained; answered with a reset.
    Closed = 31, Transmit, "closed";
    /// The same, but nothing that a reset can answer.
    ClosedDropped = 32, Drop, "closed_dropped";
    /// From a client, and the backend would get it before the client's address, or in its place.
    BeforeClientAddress = 33, Drop, "before_client_address";
    /// More new flows than the listener takes from one source.
    SourceLimit = 34, Drop, "source_limit";
}

/// Capacity of `SLB_VERDICTS`: with room for those of later versions, which work on the same map.
pub const MAX_VERDICTS: usize = 64;

// Slots have neither gaps nor duplicates.
const _: () = {
    let mut slot = 0;
    assert!(Verdict::ALL.len() <= MAX_VERDICTS);
    while slot < Verdict::ALL.len() {
        assert!(Verdict::ALL[slot] as usize == slot);
        slot += 1;
    }
};
