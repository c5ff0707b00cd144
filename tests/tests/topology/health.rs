//! What is known of a backend's health ends with its checks: added or checked again, its first probe decides.

use std::fs;

use slb_lab::Load;

use crate::support::{
    Lab, answers_more, expect_unscathed,
    plan::{self, vips, who},
};

const NAME: &str = "web-2";
/// Within it nothing but a first probe can decide: a second one comes later than a test waits.
const SLOW: &str = "interval = \"50s\"";
/// New connections per second.
const RATE: u32 = 200;

/// Everything is healthy, and probed again only after a long time.
fn slow_lab() -> Lab {
    let lab = Lab::start();
    lab.edit("interval = \"500ms\"", SLOW);
    reload(&lab);
    lab
}

fn reload(lab: &Lab) {
    let output = lab.gateway.slb(&["reload"]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Removes [`NAME`] from the default group, does something, and adds it again.
fn remove_and_add(lab: &mut Lab, meanwhile: impl FnOnce(&mut Lab)) {
    let file = fs::read_to_string(lab.gateway.config()).unwrap();
    let part = format!("[[instance.backend]]\n{}\nweight = 20\n", who(lab.host(NAME)));
    lab.edit(&part, "");
    reload(lab);
    meanwhile(lab);
    fs::write(lab.gateway.config(), file).unwrap();
    reload(lab);
}

#[test]
#[ignore = "needs root"]
fn backend_added_again_is_judged_by_its_first_probe() {
    let mut lab = slow_lab();
    remove_and_add(&mut lab, |lab| lab.server(NAME, plan::WEB).stop());
    lab.wait_health("tcp", plan::WEB_PORT, NAME, "unhealthy");

    remove_and_add(&mut lab, |lab| lab.server(NAME, plan::WEB).restart().unwrap());
    lab.wait_health("tcp", plan::WEB_PORT, NAME, "healthy");
}

#[test]
#[ignore = "needs root"]
fn backend_checked_again_is_judged_by_its_first_probe_and_loses_no_connection_before() {
    let mut lab = slow_lab();
    let off = format!("enabled = false\n{SLOW}");
    let load = Load::start(&lab.client, vips(plan::WEB_PORT)[0], RATE).unwrap();
    for _ in 0..5 {
        lab.edit(SLOW, &off);
        reload(&lab);
        lab.edit(&off, SLOW);
        reload(&lab);
        answers_more(&load, 50);
    }
    expect_unscathed(load);
    lab.wait_all_healthy();

    lab.edit(SLOW, &off);
    reload(&lab);
    lab.server(NAME, plan::WEB).stop();
    lab.edit(&off, SLOW);
    reload(&lab);
    lab.wait_health("tcp", plan::WEB_PORT, NAME, "unhealthy");
}
