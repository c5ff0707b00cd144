//! Who gets how much.

use crate::support::{
    Lab, make_generic,
    plan::{self, vips},
};

/// Exchanges per table: a multiple of the sum of all weights.
const COUNT: usize = 2_000;
/// How far a share by hash may be off, as a part of all: four standard deviations.
const TOLERANCE: f64 = 0.044;

#[test]
#[ignore = "needs root"]
fn given_weights_when_clients_come_then_everybody_gets_its_share_and_weight_zero_gets_nothing() {
    let lab = Lab::start();
    let cases = [
        ("tcp", "tch", plan::WEB_PORT),
        ("tcp", "wrr", plan::API_PORT),
        ("udp", "wrr", plan::UDP_PORT),
        ("udp", "tch", plan::UDP_HASHED_PORT),
    ];
    for (protocol, scheduler, port) in cases {
        for to in vips(port) {
            let case = format!("{protocol} {scheduler} {to}");
            let outcome = match protocol {
                "udp" => lab.client.udp(to, COUNT, 32).unwrap(),
                _ => lab.client.http(to, COUNT, 32).unwrap(),
            };
            assert_eq!(outcome.failed(), 0, "{case}: {outcome}");
            assert_eq!(outcome.share(plan::SPARE), 0.0, "{case}: {outcome}");
            for (host, weight) in lab.topology.backends.iter().zip(plan::WEIGHTS) {
                let off = (outcome.share(&host.name) - f64::from(weight) / 100.0).abs();
                let allowed = if scheduler == "wrr" { 1e-9 } else { TOLERANCE };
                assert!(off <= allowed, "{case}, {} of weight {weight}: {outcome}", host.name);
            }
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_generic_mode_when_clients_come_then_they_are_balanced_as_well() {
    let mut lab = Lab::prepare();
    make_generic(&lab.gateway);
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();

    for (tcp, udp) in vips(plan::API_PORT).into_iter().zip(vips(plan::UDP_PORT)) {
        for outcome in [lab.client.http(tcp, 100, 4).unwrap(), lab.client.udp(udp, 100, 4).unwrap()]
        {
            assert_eq!((outcome.ok(), outcome.per_backend.len()), (100, 4), "{tcp}: {outcome}");
        }
    }

    let status = lab.gateway.status().unwrap();
    for interface in status["interfaces"].as_array().unwrap() {
        assert_eq!(interface["mode"], "generic", "{interface}");
    }
}
