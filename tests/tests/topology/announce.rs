//! VIPs are held and announced as the configuration says, and the status has what is not announced.

use std::net::IpAddr;

use serde_json::Value;
use slb_lab::topology::{VIP_V4, VIP_V6};

use crate::support::{Lab, NOTICED, edit, output};

/// The VIPs that the gateway has as addresses.
fn held(lab: &Lab) -> Vec<IpAddr> {
    let shown = output(&lab.topology.gateway, "ip", &["-json", "address", "show"]);
    let interfaces: Value = serde_json::from_str(&shown).unwrap();
    let addresses = interfaces.as_array().unwrap().iter().flat_map(|interface| {
        interface["addr_info"].as_array().unwrap().iter().filter_map(|info| info["local"].as_str())
    });
    let addresses: Vec<IpAddr> = addresses.map(|address| address.parse().unwrap()).collect();
    let vips = [IpAddr::from(VIP_V4), VIP_V6.into()];
    vips.into_iter().filter(|vip| addresses.contains(vip)).collect()
}

fn reload(lab: &Lab) {
    let reloaded = lab.gateway.slb(&["reload"]).unwrap();
    assert!(reloaded.status.success(), "{reloaded:?}");
}

#[test]
#[ignore = "needs root"]
fn vip_on_a_link_that_is_down_is_a_problem_until_the_link_is_up() {
    let lab = Lab::start();
    let problem = format!("VIP {VIP_V4} is not announced: interface wan0 is down");
    let has_problem = |status: &Value| status["problems"].to_string().contains(&problem);
    assert!(!has_problem(&lab.gateway.status().unwrap()));

    lab.topology.gateway.ip("link set wan0 down").unwrap();
    lab.gateway.wait("the problem is reported", NOTICED, has_problem).unwrap();

    lab.topology.gateway.ip("link set wan0 up").unwrap();
    lab.gateway.wait("the problem is over", NOTICED, |status| !has_problem(status)).unwrap();
    assert_eq!(held(&lab), [IpAddr::from(VIP_V4), VIP_V6.into()]);
}

#[test]
#[ignore = "needs root"]
fn interface_that_is_down_is_a_problem_of_its_own_whoever_announces_the_vips() {
    let lab = Lab::start();
    edit(&lab.gateway, "\"arp\"", "\"none\"");
    reload(&lab);
    let problems = |status: &Value| -> Vec<String> {
        let all = status["problems"].as_array().unwrap();
        let down = all.iter().filter(|problem| problem["name"] == "interface_down");
        down.map(|problem| problem["subject"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(problems(&lab.gateway.status().unwrap()), <[&str; 0]>::default());
    lab.topology.gateway.ip("link set wan0 down").unwrap();
    let is_told = |status: &Value| problems(status) == ["wan0"];
    let took = lab.gateway.wait("the problem is reported", NOTICED, is_told).unwrap();
    eprintln!("reported after {took:?}");
    lab.topology.gateway.ip("link set wan0 up").unwrap();
    lab.gateway.wait("it is over", NOTICED, |status| problems(status).is_empty()).unwrap();
}

#[test]
#[ignore = "needs root"]
fn reload_withdraws_vips_that_another_program_announces_and_takes_them_back() {
    let lab = Lab::start();
    let both = [IpAddr::from(VIP_V4), VIP_V6.into()];
    assert_eq!(held(&lab), both);
    for (from, to, expected) in [("\"arp\"", "\"none\"", &[][..]), ("\"none\"", "\"arp\"", &both)] {
        edit(&lab.gateway, from, to);
        reload(&lab);
        lab.gateway
            .wait("VIPs are held as configured", NOTICED, |_| held(&lab) == expected)
            .unwrap();
    }
}
