//! Frames that take several buffers.

use slb_lab::Netns;

use crate::support::{
    Lab, output,
    plan::{self, vips},
};

/// Gives every interface of a namespace room for jumbo frames.
fn widen(netns: &Netns) {
    let all = "for link in $(ip -o link | cut -d' ' -f2 | cut -d@ -f1 | tr -d :); do \
               test $link = lo || ip link set $link mtu 9000 || exit 1; done";
    output(netns, "sh", &["-ec", all]);
}

#[test]
#[ignore = "needs root"]
fn given_jumbo_frames_when_clients_come_then_they_are_served_by_the_driver() {
    let mut lab = Lab::prepare();
    let topology = &lab.topology;
    let hosts = topology.clients.iter().chain(&topology.backends);
    for netns in hosts.map(|host| &host.netns).chain([&topology.fabric, &topology.gateway]) {
        widen(netns);
    }
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    for port in [plan::WEB_PORT, plan::API_PORT] {
        for to in vips(port) {
            let before = replied(&lab);
            let size = 20_000_000;
            assert_eq!(lab.client.download(to, size).unwrap().bytes, size, "{to}");
            let after = replied(&lab);
            let mean = (after.1 - before.1) / (after.0 - before.0);
            assert!(mean > 5_000, "{to}: {mean} bytes per frame");
            let vip = to.ip().to_string();
            let client = &lab.topology.clients[0].netns;
            output(client, "ping", &["-c", "2", "-W", "2", "-M", "do", "-s", "8900", &vip]);
        }
    }
    for interface in lab.gateway.status().unwrap()["interfaces"].as_array().unwrap() {
        assert_eq!(interface["mode"], "native", "{interface}");
    }
}

/// Packets and bytes from backends.
fn replied(lab: &Lab) -> (u64, u64) {
    let count = &lab.gateway.status().unwrap()["verdicts"]["replied"];
    (count["packets"].as_u64().unwrap_or_default(), count["bytes"].as_u64().unwrap_or_default())
}
