//! Another host claims a VIP: the operator learns of it, and clients come back.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use slb_lab::topology::{VIP_V4, VIP_V6};

use crate::support::{
    Lab, NOTICED,
    claims::{Claimer, MAC, MAC_TEXT},
    edit, output,
    plan::{self, vips},
    wait_until,
};

/// Within this time after the last claim clients are served again, and what a loaded machine takes.
const BACK: Duration = Duration::from_millis(1_000 + 500);
/// Longer than the agent takes to find that claims have ended, so that nothing is announced later.
const SETTLED: Duration = Duration::from_millis(2_500);

fn problem(status: &Value, vip: IpAddr) -> Option<String> {
    let problems = status["problems"].as_array().unwrap();
    let found = problems.iter().find(|problem| {
        problem["name"] == "vip_claimed" && problem["subject"] == vip.to_string()
    })?;
    Some(found["text"].as_str().unwrap().to_owned())
}

/// How long it takes until a client is served.
fn out_for(lab: &Lab, vip: SocketAddr) -> Duration {
    let begin = Instant::now();
    let connects = || {
        let patience = Duration::from_millis(100);
        lab.topology.clients[0].netns.run(|| TcpStream::connect_timeout(&vip, patience).is_ok())
    };
    wait_until("clients are back", || connects().unwrap());
    begin.elapsed()
}

fn events(lab: &Lab) -> String {
    String::from_utf8(lab.gateway.slb(&["events"]).unwrap().stdout).unwrap()
}

#[test]
#[ignore = "needs root"]
fn vip_that_another_host_claims_is_a_problem_and_clients_are_back_a_second_later() {
    let lab = Lab::start();
    let claimer = Claimer::new(&lab.topology.clients[1]);
    for to in vips(plan::WEB_PORT) {
        out_for(&lab, to);
        let vip = to.ip();
        // Quick ones, as of a host that takes an address over, and then some more.
        for pause in [1, 1, 100, 100, 400, 400, 1] {
            claimer.claim(vip, MAC);
            thread::sleep(Duration::from_millis(pause));
        }
        let took = out_for(&lab, to);
        eprintln!("{vip}: out for {took:?} after the last claim");
        assert!(took < BACK, "{vip}: {took:?}");
        lab.gateway
            .wait("the problem is there", NOTICED, |status| problem(status, vip).is_some())
            .unwrap();
        let status = lab.gateway.status().unwrap();
        let text = problem(&status, vip).unwrap();
        for part in [&vip.to_string(), MAC_TEXT, "wan0"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(status["vip_claims"][vip.to_string()], 7);
        assert!(events(&lab).contains(&text), "{}", events(&lab));
    }
}

#[test]
#[ignore = "needs root"]
fn flood_of_claims_costs_one_event_and_clients_are_back_after_it() {
    let lab = Lab::start();
    let claimer = Claimer::new(&lab.topology.clients[1]);
    let vip = IpAddr::from(VIP_V4);
    // Now the clients have an entry that claims can change.
    out_for(&lab, SocketAddr::new(vip, plan::WEB_PORT));
    let begin = Instant::now();
    let mut sent = 0_u32;
    while begin.elapsed() < Duration::from_secs(3) {
        for _ in 0..50 {
            let [_, _, high, low] = sent.to_be_bytes();
            claimer.claim(vip, [0x02, 0, 0, 1, high, low]);
            sent += 1;
        }
        thread::sleep(Duration::from_millis(5));
    }
    let asked = Instant::now();
    let status = lab.gateway.status().unwrap();
    assert!(asked.elapsed() < Duration::from_secs(1), "the agent answers");
    let text = problem(&status, vip).unwrap();
    assert!(text.contains("others") && text.len() < 200, "{text}");
    assert_eq!(events(&lab).matches("is claimed by").count(), 1, "{}", events(&lab));
    let took = out_for(&lab, SocketAddr::new(vip, plan::WEB_PORT));
    eprintln!("{sent} claims; clients are out for {took:?} after the last");
    assert!(took < BACK, "{took:?}");
}

#[test]
#[ignore = "needs root"]
fn vip_that_another_program_announces_is_not_defended() {
    let lab = Lab::start();
    edit(&lab.gateway, "\"arp\"", "\"none\"");
    let reloaded = lab.gateway.slb(&["reload"]).unwrap();
    assert!(reloaded.status.success(), "{reloaded:?}");
    let claimer = Claimer::new(&lab.topology.clients[1]);
    let client = &lab.topology.clients[0].netns;
    for vip in [IpAddr::from(VIP_V4), VIP_V6.into()] {
        // An entry that claims can change.
        client
            .ip(&format!("neigh replace {vip} lladdr 02:00:00:00:00:77 dev eth0 nud stale"))
            .unwrap();
        for _ in 0..3 {
            claimer.claim(vip, MAC);
            thread::sleep(Duration::from_millis(100));
        }
        thread::sleep(SETTLED);
        assert_eq!(problem(&lab.gateway.status().unwrap(), vip), None);
        let entry = output(client, "ip", &["neigh", "show", &vip.to_string()]);
        assert!(entry.contains(MAC_TEXT), "{entry}");
    }
}
