//! What the lab serves, and how `slb` is told to balance it.

use std::{fmt::Write as _, net::IpAddr};

use serde_json::Value;
use slb_tests::{BACKENDS, Host, Service, Topology, gateway::backends, topology};

/// TCP listener of the default group, scheduler `tch`.
pub const WEB_PORT: u16 = 80;
/// UDP listener of the default group, scheduler `wrr`; also the backends' port.
pub const UDP_PORT: u16 = 5353;
/// TCP listener of a VServer group, scheduler `wrr`, with a backend of weight 0.
pub const API_PORT: u16 = 81;
/// TCP listener of a primary/secondary group.
pub const DB_PORT: u16 = 5432;

/// The backends' HTTP servers: for [`WEB_PORT`], [`API_PORT`] and [`DB_PORT`].
pub const WEB: Service = Service::Http(8080);
const API: Service = Service::Http(8081);
pub const DB: Service = Service::Http(8443);
/// What every backend serves.
pub const SERVICES: [Service; 4] = [WEB, API, DB, Service::Udp(UDP_PORT)];

/// The backend of weight 0, one more server on the last host.
pub const SPARE: &str = "spare";
/// Where it listens.
pub const SPARE_PORT: u16 = 8082;

/// Weights of the backends, in their order.
pub const WEIGHTS: [u32; BACKENDS as usize] = [10, 20, 30, 40];

/// Both virtual addresses.
pub fn vips() -> [IpAddr; 2] {
    [topology::VIP_V4.into(), topology::VIP_V6.into()]
}

/// The configuration, without `[gateway]`.
pub fn instances(topology: &Topology) -> String {
    let vips = vips().map(|vip| vip.to_string());
    let mut text = format!("[[instance]]\nname = \"lab\"\nvips = {vips:?}\n");
    let hosts = &topology.backends;
    for (host, weight) in hosts.iter().zip(WEIGHTS) {
        put(&mut text, format_args!("[[instance.backend]]\n{}\nweight = {weight}\n", who(host)));
    }

    text.push_str("\n[[instance.group]]\nname = \"api\"\n");
    for (host, weight) in hosts.iter().zip(WEIGHTS) {
        put(
            &mut text,
            format_args!(
                "[[instance.group.backend]]\n{}\nport = {}\nweight = {weight}\n",
                who(host),
                API.port()
            ),
        );
    }
    if let Some(host) = hosts.last() {
        put(
            &mut text,
            format_args!(
                "[[instance.group.backend]]\nname = {SPARE:?}\naddress = {:?}\nport = \
                 {SPARE_PORT}\nweight = 0\n",
                addresses(host)
            ),
        );
    }

    if let [primary, secondary, ..] = hosts.as_slice() {
        text.push_str("\n[[instance.group]]\nname = \"db\"\n");
        for (role, host) in [("primary", primary), ("secondary", secondary)] {
            put(
                &mut text,
                format_args!(
                    "{role} = {{ name = {:?}, address = {:?}, port = {} }}\n",
                    host.name,
                    addresses(host),
                    DB.port()
                ),
            );
        }
    }

    let http = "type = \"http\"\npath = \"/healthz\"";
    let udp = "type = \"udp\"\nsend = \"ping\"\nreceive = \"ping\"";
    let default = |service: Service| format!("backend_port = {}", service.port());
    let listeners = [
        ("tcp", WEB_PORT, default(WEB) + "\nscheduler = \"tch\"", http),
        ("udp", UDP_PORT, format!("backend_port = {UDP_PORT}\nscheduler = \"wrr\""), udp),
        ("tcp", API_PORT, "group = \"api\"\nscheduler = \"wrr\"".to_owned(), http),
        ("tcp", DB_PORT, "group = \"db\"".to_owned(), "type = \"tcp\""),
    ];
    for (protocol, port, target, check) in listeners {
        put(
            &mut text,
            format_args!(
                "\n[[instance.listener]]\nprotocol = {protocol:?}\nport = {port}\n{target}\n\
                 [instance.listener.health_check]\n{check}\ninterval = \"500ms\"\n\
                 timeout = \"200ms\"\nhealthy = 2\nunhealthy = 2\n"
            ),
        );
    }
    text
}

/// Whether every backend that is checked is healthy, at every listener.
pub fn all_healthy(status: &Value) -> bool {
    let listeners = [("tcp", WEB_PORT), ("udp", UDP_PORT), ("tcp", API_PORT), ("tcp", DB_PORT)];
    listeners.into_iter().all(|(protocol, port)| {
        let backends = backends(status, protocol, port);
        !backends.is_empty()
            && backends
                .into_iter()
                .all(|backend| backend["health"] == "healthy" || backend["role"] == "secondary")
    })
}

fn put(text: &mut String, more: std::fmt::Arguments<'_>) {
    text.write_fmt(more).expect("a String takes all that is written to it");
}

fn who(host: &Host) -> String {
    format!("name = {:?}\naddress = {:?}", host.name, addresses(host))
}

fn addresses(host: &Host) -> [String; 2] {
    host.addresses().map(|address| address.to_string())
}
