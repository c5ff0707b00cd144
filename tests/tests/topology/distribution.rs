//! Who got how many flows, and why.

use std::thread;

use serde_json::Value;
use slb_lab::Load;

use crate::support::{
    Lab, answers_more, expect_unscathed,
    plan::{self, vips},
};

/// New connections per second.
const RATE: u32 = 500;

/// What `slb distribution` says of the backends at IPv4 addresses of a listener.
fn distribution(lab: &Lab, window: &str, listener: &str) -> Value {
    let args = ["distribution", "--json", "--window", window, "--listener", listener];
    let output = lab.gateway.slb(&args).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let found: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    found.into_iter().find(|distribution| distribution["family"] == "IPv4").unwrap()
}

#[test]
#[ignore = "needs root"]
fn given_traffic_when_asked_for_the_distribution_then_it_says_whether_shares_are_as_expected() {
    let lab = Lab::start();
    let load = Load::start(&lab.client, vips(plan::WEB_PORT)[0], RATE).unwrap();
    answers_more(&load, 10);
    let found = distribution(&lab, "3s", "tcp/80");
    assert_eq!(found["verdict"], "as expected", "{found:#}");
    assert_eq!(found["is_as_expected"], true);
    assert!(found["total"].as_u64().unwrap() > 500, "{found:#}");
    let backends = found["backends"].as_array().unwrap();
    let expected: f64 =
        backends.iter().map(|backend| backend["expected_share"].as_f64().unwrap()).sum();
    assert!(backends.len() == 4 && (expected - 1.0).abs() < 1e-9, "{found:#}");

    // Something happens while it counts.
    let found = thread::scope(|scope| {
        let found = scope.spawn(|| distribution(&lab, "4s", "tcp/80"));
        answers_more(&load, u64::from(RATE));
        let args = ["backend", "weight", "lab", "web-4", "0"];
        assert!(lab.gateway.slb(&args).unwrap().status.success());
        found.join().unwrap()
    });
    let expected = "the weight of web-4 changed in between, from 40 to 0";
    assert_eq!(found["verdict"], expected, "{found:#}");
    expect_unscathed(load);

    assert_eq!(distribution(&lab, "10ms", "tcp/81")["verdict"], "no new flows");
    let output = lab.gateway.slb(&["distribution", "--listener", "tcp/9"]).unwrap();
    assert_eq!(output.status.code(), Some(2));
    let output = lab.gateway.slb(&["distribution", "--window", "soon"]).unwrap();
    assert_eq!(output.status.code(), Some(2));
}
