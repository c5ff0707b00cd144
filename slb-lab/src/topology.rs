//! The hosts of the lab, and their addresses.
//!
//! ```text
//!   client-1 .10 ─┐                                             ┌─ web-1 .11
//!   client-2 .11 ─┴─ bridge ─── wan0  gateway  lan0 ─── bridge ─┼─ web-2 .12
//!                    192.0.2.0/24 .1       .1 10.0.0.0/24       ├─ web-3 .13
//!                    2001:db8:1::/64          2001:db8:10::/64  └─ web-4 .14
//! ```
//!
//! Both bridges live in one more namespace, the fabric. The VIPs are neighbours of the clients, so
//! a host must answer for them: announcing is part of what is tested.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use anyhow::Result;

use crate::{netns, netns::Netns, scratch};

/// Number of backends.
pub const BACKENDS: u8 = 4;
/// Number of clients.
pub const CLIENTS: u8 = 2;
/// Virtual address that the clients connect to.
pub const VIP_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
/// Virtual address that the clients connect to.
pub const VIP_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x100);
/// The gateway's devices: towards the clients, towards the backends.
pub const INTERFACES: [&str; 2] = ["wan0", "lan0"];

/// A client or a backend: one namespace with one device.
#[derive(Clone, Debug)]
pub struct Host {
    /// `client-1`, `web-1` and so on.
    pub name: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// Where it lives.
    pub netns: Arc<Netns>,
    fabric: Arc<Netns>,
}

impl Host {
    /// The host dies silently: from now on nothing reaches it and nothing comes from it.
    ///
    /// # Errors
    ///
    /// The fabric is gone.
    pub fn unplug(&self) -> Result<()> {
        self.fabric.ip(&format!("link set {} down", self.name))
    }

    /// The end of [`unplug`](Self::unplug).
    ///
    /// # Errors
    ///
    /// The fabric is gone.
    pub fn plug(&self) -> Result<()> {
        self.fabric.ip(&format!("link set {} up", self.name))
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// All namespaces of a lab, cabled and addressed.
#[derive(Debug)]
pub struct Topology {
    /// [`CLIENTS`] of them.
    pub clients: Vec<Host>,
    /// Forwards packets by itself; has the devices [`INTERFACES`].
    pub gateway: Arc<Netns>,
    /// [`BACKENDS`] of them.
    pub backends: Vec<Host>,
    /// The switches; a host's port has the host's name.
    pub fabric: Arc<Netns>,
}

impl Topology {
    /// Removes what dead labs left, then builds this one.
    ///
    /// # Errors
    ///
    /// Not root, `ip` or `ethtool` missing, or a kernel without veth or bridge.
    pub fn build() -> Result<Self> {
        netns::remove_stale();
        scratch::remove_stale();

        let fabric = Arc::new(Netns::create("fabric")?);
        fabric.sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        for bridge in ["wan", "lan"] {
            // Snooping would keep neighbour discovery from hosts that joined no group yet.
            fabric.ip(&format!(
                "link add {bridge} type bridge mcast_snooping 0\nlink set {bridge} up"
            ))?;
        }

        let gateway = Arc::new(Netns::create("gw")?);
        quiet(&gateway)?;
        gateway.sysctl("ipv4/ip_forward", "1")?;
        gateway.sysctl("ipv6/conf/all/forwarding", "1")?;
        cable(&fabric, "wan", "gw-wan", &gateway, "wan0")?;
        gateway.ip("addr add 192.0.2.1/24 dev wan0\n\
                    addr add 2001:db8:1::1/64 dev wan0 nodad")?;
        cable_lan(&fabric, &gateway)?;

        let clients = (0..CLIENTS)
            .map(|i| {
                let v4 = Ipv4Addr::new(192, 0, 2, 10 + i);
                let v6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10 + u16::from(i));
                let client = host(&fabric, "wan", format!("client-{}", i + 1), v4, v6)?;
                client.netns.ip("route add default via 192.0.2.1\n\
                                 route add default via 2001:db8:1::1")?;
                // `Client` takes its ports from below these.
                client.netns.sysctl("ipv4/ip_local_port_range", "60000 65535")?;
                client.netns.sysctl("ipv4/tcp_tw_reuse", "1")?;
                Ok(client)
            })
            .collect::<Result<_>>()?;
        let backends = (0..BACKENDS)
            .map(|i| {
                let v4 = Ipv4Addr::new(10, 0, 0, 11 + i);
                let v6 = Ipv6Addr::new(0x2001, 0xdb8, 0x10, 0, 0, 0, 0, 0x11 + u16::from(i));
                let backend = host(&fabric, "lan", format!("web-{}", i + 1), v4, v6)?;
                backend.netns.ip("route add default via 10.0.0.1\n\
                                  route add default via 2001:db8:10::1")?;
                Ok(backend)
            })
            .collect::<Result<_>>()?;
        Ok(Self { clients, gateway, backends, fabric })
    }

    /// Another gateway beside the first, at `.2` of both networks: this topology as it sees it, without
    /// hosts.
    ///
    /// # Errors
    ///
    /// As those of [`build`](Self::build).
    pub fn second_gateway(&self) -> Result<Self> {
        let gateway = Arc::new(Netns::create("gw2")?);
        quiet(&gateway)?;
        gateway.sysctl("ipv4/ip_forward", "1")?;
        gateway.sysctl("ipv6/conf/all/forwarding", "1")?;
        for (bridge, port, device, network) in
            [("wan", "gw2-wan", "wan0", "192.0.2"), ("lan", "gw2-lan", "lan0", "10.0.0")]
        {
            cable(&self.fabric, bridge, port, &gateway, device)?;
            gateway.ip(&format!("addr add {network}.2/24 dev {device}"))?;
        }
        let fabric = Arc::clone(&self.fabric);
        Ok(Self { clients: Vec::new(), gateway, backends: Vec::new(), fabric })
    }

    /// Pulls the gateway's card towards the backends, and puts a new one in its place.
    ///
    /// # Errors
    ///
    /// The gateway or the fabric is gone.
    pub fn replace_lan_card(&self) -> Result<()> {
        self.gateway.ip("link del lan0")?;
        cable_lan(&self.fabric, &self.gateway)?;
        // Over IPv6 nothing tells them of the new hardware address (`ndisc_notify` is 0), and they
        // would send to the old one until they doubt it, for up to a minute.
        self.backends.iter().try_for_each(|host| host.netns.ip("neigh flush dev eth0"))
    }
}

fn cable_lan(fabric: &Netns, gateway: &Netns) -> Result<()> {
    cable(fabric, "lan", "gw-lan", gateway, "lan0")?;
    gateway.ip("addr add 10.0.0.1/24 dev lan0\naddr add 2001:db8:10::1/64 dev lan0 nodad")
}

fn host(
    fabric: &Arc<Netns>,
    bridge: &str,
    name: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
) -> Result<Host> {
    let netns = Arc::new(Netns::create(&name)?);
    quiet(&netns)?;
    cable(fabric, bridge, &name, &netns, "eth0")?;
    netns.ip(&format!("addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad"))?;
    Ok(Host { name, v4, v6, netns, fabric: Arc::clone(fabric) })
}

/// No duplicate address detection, no router solicitations: addresses work at once.
fn quiet(netns: &Netns) -> Result<()> {
    for (key, value) in [("accept_dad", "0"), ("accept_ra", "0"), ("router_solicitations", "0")] {
        netns.sysctl(&format!("ipv6/conf/default/{key}"), value)?;
    }
    Ok(())
}

/// A veth pair from `port`, on the fabric's `bridge`, to `device` in `netns`.
fn cable(fabric: &Netns, bridge: &str, port: &str, netns: &Netns, device: &str) -> Result<()> {
    fabric.ip(&format!(
        "link add {port} type veth peer name {device} netns {}\n\
         link set {port} master {bridge} up",
        netns.name()
    ))?;
    // XDP on the gateway sees and sends frames as they are on the wire: with the checksum filled
    // in, which is what every device has to do for itself then.
    fabric.offload(port, "tx", false)?;
    netns.offload(device, "tx", false)?;
    // Frames redirected into a veth are lost, uncounted, unless its peer polls; GRO makes it.
    fabric.offload(port, "gro", true)?;
    netns.ip(&format!("link set {device} up"))
}
