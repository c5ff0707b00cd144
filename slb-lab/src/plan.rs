//! What the lab serves, and how `slb` is told to balance it.

use std::net::{IpAddr, SocketAddr};

use crate::{Host, Service, Topology, gateway::backends, topology};
use serde_json::Value;

/// TCP, default group, scheduler `tch`.
pub const WEB_PORT: u16 = 80;
/// TCP, VServer group with a backend of weight 0, scheduler `wrr`.
pub const API_PORT: u16 = 81;
/// UDP, default group, scheduler `wrr`.
pub const UDP_PORT: u16 = 5353;
/// UDP, default group, scheduler `tch`.
pub const UDP_HASHED_PORT: u16 = 5354;
/// TCP, primary/secondary group.
pub const DB_PORT: u16 = 5432;
/// UDP, primary/secondary group.
pub const LOG_PORT: u16 = 5433;
const LISTENERS: [(&str, u16); 6] = [
    ("tcp", WEB_PORT),
    ("tcp", API_PORT),
    ("udp", UDP_PORT),
    ("udp", UDP_HASHED_PORT),
    ("tcp", DB_PORT),
    ("udp", LOG_PORT),
];

/// Of the default group.
pub const WEB: Service = Service::Http(8080);
/// Of the VServer group.
pub const API: Service = Service::Http(8081);
/// Of both UDP listeners with weights.
pub const UDP: Service = Service::Udp(5353);
/// Of the primary/secondary group for TCP.
pub const DB: Service = Service::Http(8443);
/// Of the primary/secondary group for UDP.
pub const LOG: Service = Service::Udp(5140);
/// On every backend.
pub const SERVICES: [Service; 5] = [WEB, API, UDP, DB, LOG];

/// The backend of weight 0, one more server on the last host.
pub const SPARE: &str = "spare";
/// What it serves.
pub const SPARE_SERVICE: Service = Service::Http(8082);

/// Weights of the backends, in their order.
pub const WEIGHTS: [u32; 4] = [10, 20, 30, 40];
/// The primary of the primary/secondary groups.
pub const PRIMARY: &str = "web-1";
/// Their secondary.
pub const SECONDARY: &str = "web-2";

/// Consecutive successes of a probe, unless a test wants it slow.
pub const HEALTHY: u8 = 2;

/// `port` on both virtual addresses.
pub fn vips(port: u16) -> [SocketAddr; 2] {
    [IpAddr::from(topology::VIP_V4), topology::VIP_V6.into()].map(|vip| SocketAddr::new(vip, port))
}

/// Of a probe. A server on a busy machine may take a while.
pub const TIMEOUT: &str = "400ms";

/// The configuration, without `[gateway]`. After `healthy` successes an unhealthy backend is back.
pub fn instances(topology: &Topology, healthy: u8) -> String {
    let mut text = format!(
        "[[instance]]\nname = \"lab\"\nvips = [\"{}\", \"{}\"]\n",
        topology::VIP_V4,
        topology::VIP_V6
    );
    let hosts = || topology.backends.iter().zip(WEIGHTS);
    for (host, weight) in hosts() {
        text += &format!("[[instance.backend]]\n{}\nweight = {weight}\n", who(host));
    }
    text += "[[instance.group]]\nname = \"api\"\n";
    for (host, weight) in hosts() {
        let (who, port) = (who(host), API.port());
        text += &format!("[[instance.group.backend]]\n{who}\nport = {port}\nweight = {weight}\n");
    }
    text += &format!(
        "[[instance.group.backend]]\nname = \"{SPARE}\"\naddress = {:?}\nport = {}\nweight = 0\n",
        addresses(&topology.backends[3]),
        SPARE_SERVICE.port()
    );
    for (name, service) in [("db", DB), ("log", LOG)] {
        text += &format!("[[instance.group]]\nname = \"{name}\"\n");
        for (role, host) in [("primary", 0), ("secondary", 1)] {
            let host = &topology.backends[host];
            text += &format!("[instance.group.{role}]\n{}\nport = {}\n", who(host), service.port());
        }
    }
    let http = "type = \"http\"\npath = \"/healthz\"";
    let udp = "type = \"udp\"\nsend = \"ping\"\nreceive = \"ping\"";
    let web = format!("backend_port = {}", WEB.port());
    let dns = format!("backend_port = {}\nscheduler", UDP.port());
    let targets = [
        (web, http),
        ("group = \"api\"\nscheduler = \"wrr\"".to_owned(), http),
        (format!("{dns} = \"wrr\""), udp),
        (format!("{dns} = \"tch\""), udp),
        ("group = \"db\"".to_owned(), "type = \"tcp\""),
        ("group = \"log\"".to_owned(), udp),
    ];
    for ((protocol, port), (target, check)) in LISTENERS.into_iter().zip(targets) {
        text += &format!(
            "[[instance.listener]]\nprotocol = \"{protocol}\"\nport = {port}\n{target}\n\
             [instance.listener.health_check]\n{check}\ninterval = \"500ms\"\ntimeout = \
             {TIMEOUT:?}\nhealthy = {healthy}\nunhealthy = 2\n"
        );
    }
    text
}

/// Whether every backend that is checked is healthy, at every listener.
pub fn all_healthy(status: &Value) -> bool {
    LISTENERS.into_iter().all(|(protocol, port)| {
        let backends = backends(status, protocol, port);
        !backends.is_empty()
            && backends
                .into_iter()
                .all(|backend| backend["health"] == "healthy" || backend["role"] == "secondary")
    })
}

/// Name and addresses of a backend.
pub fn who(host: &Host) -> String {
    format!("name = {:?}\naddress = {:?}", host.name, addresses(host))
}

fn addresses(host: &Host) -> [String; 2] {
    host.addresses().map(|address| address.to_string())
}
