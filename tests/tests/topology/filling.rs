//! The flow table fills: the operator learns of it before flows are dropped.

use serde_json::Value;
use slb_lab::Sessions;

use crate::support::{
    Lab, NOTICED, edit,
    plan::{self, vips},
};

/// What the table is made for.
const FLOWS: u64 = 1_024;

fn is_filling(status: &Value) -> bool {
    let problems = status["problems"].as_array().unwrap();
    problems.iter().any(|problem| problem["name"] == "flow_table_filling")
}

#[test]
#[ignore = "needs root"]
fn flow_table_that_fills_is_a_problem_before_flows_are_dropped() {
    let mut lab = Lab::prepare();
    edit(&lab.gateway, "flows      = ", &format!("flows      = {FLOWS} # "));
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    assert!(!is_filling(&lab.gateway.status().unwrap()));

    let kept = Sessions::open(&lab.client, vips(plan::API_PORT)[0], 900).unwrap();
    let took = lab.gateway.wait("the problem is there", NOTICED, is_filling).unwrap();
    eprintln!("reported after {took:?}");
    let status = lab.gateway.status().unwrap();
    let maps = status["maps"].as_array().unwrap();
    let flows = maps.iter().find(|map| map["name"] == "SLB_FLOWS").unwrap();
    let [entries, capacity] = ["entries", "capacity"].map(|field| flows[field].as_u64().unwrap());
    assert!(capacity == FLOWS * 4 && (800..=capacity).contains(&entries), "{flows}");
    let events = String::from_utf8(lab.gateway.slb(&["events"]).unwrap().stdout).unwrap();
    assert!(events.contains("the flow table is filling"), "{events}");
    drop(kept.stop());
}
