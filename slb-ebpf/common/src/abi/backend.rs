//! `SLB_BACKENDS`: where packets are sent to, and `SLB_SOURCES`: from which addresses.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{flags::flags, net::Address, words};

/// Capacity of `SLB_BACKENDS`: one per listener, backend and address. [`super::NO_BACKEND`] is none.
pub const MAX_BACKENDS: usize = 65_535;
/// Capacity of `SLB_SOURCES`; [`NO_SOURCE`] is none.
pub const MAX_SOURCES: usize = 1_024;

/// The way to a neighbour.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct NextHop {
    /// Output interface; 0: not known, the kernel has to find out.
    pub ifindex: u32,
    /// The neighbour's MAC address.
    pub dst_mac: [u8; 6],
    /// The output interface's MAC address.
    pub src_mac: [u8; 6],
}
const _: () = assert!(size_of::<NextHop>() == 16);

impl NextHop {
    /// The kernel has to find out.
    pub const UNRESOLVED: Self = Self { ifindex: 0, dst_mac: [0; 6], src_mac: [0; 6] };

    /// Leaves it to the kernel, word by word: four zeros at once would be a call of `memset`.
    #[inline(always)]
    pub fn clear(&mut self) {
        words::clear::<4>(zerocopy::transmute_mut!(self));
    }

    /// Whether the frame can be sent from XDP.
    #[must_use]
    #[inline(always)]
    pub const fn is_known(self) -> bool {
        self.ifindex != 0
    }

    /// The interface, and both MAC addresses as they stand at the beginning of a frame.
    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        zerocopy::transmute!(self)
    }

    /// From an interface and the first 12 bytes of a frame.
    #[must_use]
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        zerocopy::transmute!(words)
    }

    /// Both MAC addresses, as they stand at the beginning of a frame.
    #[must_use]
    #[inline(always)]
    pub const fn mac_words(self) -> [u32; 3] {
        let [_, a, b, c] = self.words();
        [a, b, c]
    }

    /// From an interface and the first 12 bytes of a frame.
    #[must_use]
    #[inline(always)]
    pub const fn from_mac_words(ifindex: u32, [a, b, c]: [u32; 3]) -> Self {
        Self::from_words([ifindex, a, b, c])
    }
}

/// Value of `SLB_BACKENDS`: one backend of one listener at one of its addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, FromBytes, Immutable, IntoBytes)]
pub struct Backend {
    /// Address that packets are sent to.
    pub addr: Address,
    /// The way to it.
    pub hop: NextHop,
    /// Port that packets are sent to.
    pub port: u32,
    /// What is known of it.
    pub flags: BackendFlags,
    /// A flow without a packet for this many jiffies is forgotten.
    pub idle_jiffies: u32,
    /// [`super::Listener::id`] of the listener that this is a backend of.
    pub listener: u16,
    /// For [`super::Scheduler::LEAST`]: how many flows it is to have, relative to the others.
    pub weight: u16,
    /// How a packet reaches it.
    pub mode: Mode,
    /// The longest packet that gets there, in bytes from its IP header on, as it arrives here: what a
    /// tunnel adds is taken off. 0: not known.
    pub mtu: u32,
    /// First index into `SLB_SOURCES` of the addresses that packets to it may be given as a source, or
    /// [`NO_SOURCE`].
    pub source: u16,
    /// How many there are.
    pub sources: u16,
    /// Low half of the jiffies when the flows of a backend that is being drained are ended; 0: never. Not for the
    /// program: a restarted agent goes on from here.
    pub closes: u32,
}
const _: () = assert!(size_of::<Backend>() == 64);

flags! {
    /// What is known of a backend.
    pub struct BackendFlags: u32 {
        /// The configuration knows this backend.
        const IN_USE = 1;
        /// New flows may go there, and connectionless ones stay.
        const USABLE = 2;
        /// A probe has found it healthy. Not for the program: a restarted agent goes on from here.
        const HEALTHY = 4;
        /// A probe has found it unhealthy. Not for the program either.
        const UNHEALTHY = 8;
        /// Another VIP or listener has a backend at the same address, port and protocol: what it answers does
        /// not tell which of them it is for, so its flows have entries.
        const SHARED = 16;
        /// What a client sends begins with a PROXY protocol header ([`crate::proxy_protocol`]).
        const PROXY = 32;
        /// A client's first packets have a TCP option that says who it is.
        const OPTION = 64;
        /// Its time is up: connections that it still has are reset.
        const CLOSED = 128;
    }
}

/// How packets reach a backend.
#[repr(transparent)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default, FromBytes, Immutable, IntoBytes,
)]
pub struct Mode(u32);

impl Mode {
    /// Destination address and port are rewritten.
    pub const NAT: Self = Self(0);
    /// Only the MAC addresses are: the backend has the VIP as well, and answers by itself.
    pub const DSR: Self = Self(1);
    /// IP in IP, to a backend that has the VIP as well.
    pub const IPIP: Self = Self(2);
    /// Generic UDP encapsulation, to a backend that has the VIP as well.
    pub const GUE: Self = Self(3);
    /// All of it is rewritten, the source as well; the family may change.
    pub const FULL: Self = Self(4);

    /// Whether the backend has the VIP as well, and answers past the gateway.
    #[must_use]
    #[inline(always)]
    pub const fn is_direct(self) -> bool {
        matches!(self, Self::DSR | Self::IPIP | Self::GUE)
    }
}

/// In place of an index into `SLB_SOURCES`.
pub const NO_SOURCE: u16 = 0;
