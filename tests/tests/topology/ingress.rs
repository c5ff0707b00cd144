//! Packets that do not come from where they say, and frames that are not for the gateway.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    time::Instant,
};

use etherparse::{PacketBuilder, TcpHeader};
use slb_lab::{Host, Netns};
use socket2::{Domain, Socket, Type};

use crate::support::{
    AT_ONCE, Lab, output,
    plan::{self, vips},
    raw::{ACK, Parts, RawClient, SYN, Tap},
    wait_until,
};

/// A MAC address that no device here has at first.
const MAC: [u8; 6] = [2, 0, 0x5e, 0, 1, 7];

fn verdict(lab: &Lab, name: &str) -> u64 {
    lab.gateway.status().unwrap()["verdicts"][name]["packets"].as_u64().unwrap_or_default()
}

fn of_family(host: &Host, is_v4: bool) -> IpAddr {
    let [v4, v6] = host.addresses();
    if is_v4 { v4 } else { v6 }
}

/// Sends a SYN in a frame with this destination from the only device of `netns`.
fn send_frame(netns: &Netns, mac: [u8; 6], from: SocketAddr, to: SocketAddr) {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 0x66], mac);
    let builder = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder.ipv6(from.octets(), to.octets(), 64),
        families => panic!("two families: {families:?}"),
    };
    let mut tcp = TcpHeader::new(from.port(), to.port(), 1, 64_240);
    tcp.syn = true;
    let mut frame = Vec::new();
    builder.tcp_header(tcp).write(&mut frame, &[]).unwrap();
    let send = || -> io::Result<()> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        // SAFETY: a name that ends with 0.
        let index = unsafe { libc::if_nametoindex(c"eth0".as_ptr()) };
        // SAFETY: zeros are a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as i32;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the frame and the address are as long as is said.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                len,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    netns.run(send).unwrap().unwrap();
}

#[test]
#[ignore = "needs root"]
fn given_a_backends_address_as_source_when_it_comes_from_the_clients_side_then_nothing_of_it_goes_on()
 {
    let lab = Lab::start();
    let raw = RawClient::new(&lab.topology, &lab.topology.clients[0]);
    let (web, inside) = (lab.host("web-1"), lab.host("web-3"));
    let tap = Tap::new(&inside.netns);
    for to in vips(plan::WEB_PORT) {
        let is_v4 = to.is_ipv4();
        let from = SocketAddr::new(of_family(web, is_v4), plan::WEB.port());
        let victim = SocketAddr::new(of_family(inside, is_v4), 45_000);
        let before = verdict(&lab, "martian");
        for flags in [SYN | ACK, ACK] {
            raw.send(from, victim, (1, 1), Parts::of(flags));
        }
        wait_until("both are counted", || verdict(&lab, "martian") == before + 2);
        let deadline = Instant::now() + AT_ONCE / 4;
        while let Some(segment) = tap.next(is_v4, deadline) {
            assert!(segment.to != victim, "{segment:?}");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_flooding_switch_when_a_frame_is_for_another_host_then_it_is_left_alone_until_that_is_us()
{
    let lab = Lab::start();
    let client = &lab.topology.clients[0];
    let raw = RawClient::new(&lab.topology, client);
    for to in vips(plan::WEB_PORT) {
        let from = raw.source(to);
        let (ours, others) = (verdict(&lab, "forwarded"), verdict(&lab, "not_ours"));
        send_frame(&client.netns, MAC, from, to);
        wait_until("the frame is seen", || verdict(&lab, "not_ours") > others);
        assert_eq!(verdict(&lab, "forwarded"), ours, "{to}");
    }
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    let device = format!("link add link wan0 name vrrp0 address {mac} type macvlan mode private");
    lab.topology.gateway.ip(&format!("{device}\nlink set vrrp0 up")).unwrap();
    for to in vips(plan::WEB_PORT) {
        let from = raw.source(to);
        // Until the agent knows of the device, the kernel answers: it holds the VIP.
        wait_until("the gateway balances frames to its virtual address", || {
            send_frame(&client.netns, MAC, from, to);
            let answer = raw.receive(from, to, Instant::now() + AT_ONCE / 9);
            answer.is_some_and(|answer| answer.flags == SYN | ACK)
        });
    }
    // The others go on.
    let shown = output(&client.netns, "ip", &["neigh", "show"]);
    let outcome = lab.client.http(vips(plan::WEB_PORT)[0], 100, 8).unwrap();
    assert_eq!(outcome.failed(), 0, "{outcome}\n{shown}");
}
