//! The configuration file, and the model it is parsed into.
//!
//! A [`Config`] cannot hold a contradiction: [`parse()`] is the only way in, and it reports every
//! mistake of a file at once.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;

pub use changes::changes;
pub use edit::{EditError, apply};
pub use parse::{api, gateway_before_others, load, parse};
pub use report::{LoadError, Mistake, Report};
use slb_api::words;
pub use slb_api::{Edit, Place, Protocol, Scheduler};

use crate::seed::SharedSeed;

mod changes;
mod edit;
mod parse;
mod report;
pub mod source;

/// Where the agent looks for its file.
pub const DEFAULT_PATH: &str = "/etc/slb/slb.toml";

/// Of a backend.
pub const MAX_WEIGHT: u8 = 100;

/// Where everything is pinned by default.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/slb";

words!(XdpMode { Auto = "auto", Native = "native", Generic = "generic" });
words!(Announce { Arp = "arp", None = "none" });
words!(NoListener { Pass = "pass", Drop = "drop", Reset = "reset" });
words!(Forwarding { Nat = "nat", FullNat = "full-nat", Dsr = "dsr", Ipip = "ipip", Gue = "gue" });
words!(ClientAddress { None = "none", ProxyV2 = "proxy-v2", TcpOption = "tcp-option" });
words!(AclMode { Allow = "allow", Deny = "deny" });
words!(AllUnhealthy { FailClosed = "fail-closed", FailOpen = "fail-open" });
words!(HttpMethod { Head = "HEAD", Get = "GET" });

/// A whole, valid configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `[gateway]`.
    pub gateway: Gateway,
    /// `[[instance]]`, in the order of the file. An edit shares those that it leaves alone with the configuration
    /// before: there may be thousands of backends in them.
    pub instances: Vec<Arc<Instance>>,
}

/// `[gateway]`: the host that runs `slb`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Where XDP is attached; at least one, none twice.
    pub interfaces: Vec<String>,
    /// How it is attached.
    pub xdp_mode: XdpMode,
    /// A backend that names another region is refused.
    pub region: Option<String>,
    /// Capacity of the flow table, in flows.
    pub flows: u32,
    /// How the VIPs are held and announced.
    pub announce: Announce,
    /// What TCP and UDP get at a VIP's other ports.
    pub no_listener: NoListener,
    /// Identifiers of the VLANs that are served besides frames without a tag; `None`: all.
    pub vlans: Option<BTreeSet<u16>>,
    /// What the outer sources of tunnels begin with.
    pub tunnel_source: TunnelSource,
    /// What schedules choose by, if gateways share it; `None`: what was drawn for this one.
    pub seed: Option<SharedSeed>,
    /// Where metrics are; `None`: nowhere.
    pub http: Option<SocketAddr>,
    /// The local API's unix socket.
    pub api: PathBuf,
    /// Another one, for users who may only look; `None`: there is none.
    pub monitor: Option<PathBuf>,
    /// Directory on bpffs for everything pinned.
    pub pins: PathBuf,
}

/// How XDP is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpMode {
    /// Native where the driver has it, generic otherwise.
    Auto,
    /// In the driver.
    Native,
    /// In the kernel's stack, on any interface.
    Generic,
}

/// How the VIPs are held and announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announce {
    /// The agent: as /32 and /128 addresses, with gratuitous ARP and unsolicited NA.
    Arp,
    /// Routers, or another program.
    None,
}

/// What TCP and UDP get at a VIP where no listener is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoListener {
    /// They are left to the kernel.
    Pass,
    /// They are dropped.
    Drop,
    /// A TCP reset, or ICMP's port unreachable.
    Reset,
}

/// What the outer sources of tunnels begin with; the rest is the flow's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelSource {
    /// The first 16 bits of an IPv4 address.
    pub v4: Ipv4Addr,
    /// The first 64 bits of an IPv6 address.
    pub v6: Ipv6Addr,
}

/// Not used on the Internet: RFC 1918, and the prefix for discarding of RFC 6666.
impl Default for TunnelSource {
    fn default() -> Self {
        Self { v4: Ipv4Addr::new(172, 16, 0, 0), v6: Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0) }
    }
}

/// One load balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Unique in the file.
    pub name: String,
    /// At least one; no VIP belongs to two instances.
    pub vips: Vec<IpAddr>,
    /// The default group first, if there is one.
    pub groups: Vec<Group>,
    /// 1 to 50; protocol and port unique in the instance.
    pub listeners: Vec<Listener>,
}

/// A server group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// `None` for the default group.
    pub name: Option<String>,
    /// Default, VServer, or primary/secondary.
    pub kind: GroupKind,
    /// How a packet reaches a backend.
    pub forwarding: Forwarding,
    /// `full-nat`: what backends see as source; empty: the gateway's own address.
    pub sources: Vec<IpAddr>,
    /// `full-nat`: how backends learn who the client of a TCP connection is.
    pub client_address: ClientAddress,
    /// Primary/secondary: whether the secondary is checked as well.
    pub check_secondary: bool,
    /// Names unique in the group. Primary/secondary: exactly two, the primary first.
    pub backends: Vec<Backend>,
}

impl Group {
    /// Its name in answers; `default` for the default group.
    #[must_use]
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or("default")
    }
}

/// The three kinds of server group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupKind {
    /// The instance's own; its backends have no port.
    Default,
    /// Named; each backend with its own port.
    VServer,
    /// Exactly two backends; the second only while the first is unhealthy.
    PrimarySecondary,
}

/// How a packet reaches a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarding {
    /// Destination address and port are rewritten; replies come back through the gateway.
    Nat,
    /// The source is as well: replies come back to the gateway without a route on the backend.
    FullNat,
    /// Only the MAC address is: the backend has the VIP as well, on the same segment, and replies
    /// directly.
    Dsr,
    /// In an IP packet of either family: the backend has the VIP as well, anywhere, and replies
    /// directly.
    Ipip,
    /// The same in Generic UDP Encapsulation.
    Gue,
}

/// How backends that see a source of the gateway's learn who the client of a TCP connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAddress {
    /// Not at all.
    None,
    /// By a header of the PROXY protocol, version 2, before what the client sends.
    ProxyV2,
    /// By a TCP option of kind 254, as the TOA modules of LVS and DPVS read it.
    TcpOption,
}

impl Forwarding {
    /// Whether the backend gets the client's packets as they are, and answers by itself.
    #[must_use]
    pub const fn is_direct_return(self) -> bool {
        match self {
            Self::Nat | Self::FullNat => false,
            Self::Dsr | Self::Ipip | Self::Gue => true,
        }
    }

    /// Whether a backend can have another address family than the VIP.
    #[must_use]
    pub const fn crosses_families(self) -> bool {
        !matches!(self, Self::Dsr)
    }
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Unique in its group.
    pub name: String,
    /// One address, or one per family.
    pub addresses: Vec<IpAddr>,
    /// `None` in the default group only: the listener's `backend_port` is used.
    pub port: Option<u16>,
    /// 0 to 100; 0: no new flows.
    pub weight: u8,
    /// No new flows, and those that it has end at the listener's [`Listener::drain`].
    pub drain: bool,
    /// What connection IDs that it issues begin with ([`slb_common::quic`]).
    pub server_id: Option<u16>,
    /// As written, if at all.
    pub region: Option<String>,
}

/// Protocol and port on the instance's VIPs, and where they lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port on the VIPs.
    pub port: u16,
    /// Index into [`Instance::groups`].
    pub group: usize,
    /// `Some` exactly when the group is the default group.
    pub backend_port: Option<u16>,
    /// How a backend is chosen for a new flow.
    pub scheduler: Scheduler,
    /// For how long after its last new flow a client stays with its backend; `None`: off.
    pub persistence: Option<Duration>,
    /// After this long without a packet a flow is ended.
    pub idle_timeout: Duration,
    /// After this long the flows of a backend that is drained, or not there any more, are ended; `None`: never.
    pub drain: Option<Duration>,
    /// Which clients may connect; `None`: all.
    pub acl: Option<Acl>,
    /// How much they may.
    pub limits: Limits,
    /// What new flows get when no backend is healthy.
    pub all_unhealthy: AllUnhealthy,
    /// A disabled listener is not balanced.
    pub enabled: bool,
    /// `None`: switched off, every backend counts as healthy.
    pub health_check: Option<HealthCheck>,
}

/// `[instance.listener.acl]`: access by client address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    /// What being on the list means.
    pub mode: AclMode,
    /// The list; shared, as it may be long.
    pub sources: Arc<BTreeSet<IpNet>>,
}

/// What being on an access list means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AclMode {
    /// Only these may connect.
    Allow,
    /// These may not.
    Deny,
}

/// `[instance.listener.limits]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// New flows per second; `None`: any number.
    pub new_flows: Option<u32>,
    /// New flows per second of one source; `None`: any number.
    pub new_flows_per_source: Option<u32>,
    /// Bits per second in each direction, of whole frames; `None`: any number.
    pub bandwidth: Option<u64>,
}

/// What new flows get when no backend is healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllUnhealthy {
    /// Nothing.
    FailClosed,
    /// The backends, as if all were healthy.
    FailOpen,
}

/// Active probe of a backend on behalf of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HealthCheck {
    /// What is sent, and what is a success.
    pub probe: ProbeKind,
    /// `None`: the backend's own.
    pub port: Option<u16>,
    /// From the start of one probe to the start of the next.
    pub interval: Duration,
    /// A probe without an answer for this long has failed.
    pub timeout: Duration,
    /// Consecutive successes that make a backend healthy, 1 to 10.
    pub healthy: u8,
    /// Consecutive failures that make a backend unhealthy, 1 to 10.
    pub unhealthy: u8,
    /// Whether the backend's answers to clients count as well: resets, and none at all.
    pub passive: bool,
    /// Whether a TCP connection begins with a header of the PROXY protocol: the backend expects one.
    pub proxy_header: bool,
}

/// What a probe sends, and what it takes for a success.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    /// The handshake completes.
    Tcp,
    /// The response's status is one of those expected.
    Http(HttpProbe),
    /// See [`UdpProbe`].
    Udp(UdpProbe),
}

/// An HTTP/1.1 request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HttpProbe {
    /// Request method.
    pub method: HttpMethod,
    /// Request target in origin form; begins with `/`.
    pub path: String,
    /// `Host` header; `None`: the backend's address.
    pub host: Option<String>,
    /// Statuses that count as success, as inclusive ranges within 100..=599.
    pub expect: Vec<(u16, u16)>,
}

/// Method of an HTTP probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HttpMethod {
    /// RFC 9110, section 9.3.2.
    Head,
    /// RFC 9110, section 9.3.1.
    Get,
}

/// A datagram. Without `receive` a backend is healthy unless ICMP says that the port is unreachable.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UdpProbe {
    /// Payload; empty if not configured.
    pub send: String,
    /// What the answer must contain.
    pub receive: Option<String>,
}
