//! The agent dies, ends, and starts again; packets do not notice.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use slb_lab::{Client, Load, Sessions};

use crate::support::{
    Lab, answers_more, expect_all_go_on, expect_unscathed,
    maps::{Contents, programs},
    plan::{self, vips},
};

/// New connections per second.
const RATE: u32 = 500;
/// Answers that show that the load goes on: a second of it.
const GOES_ON: u64 = 500;
/// Bytes of one download; they are made one after the other.
const DOWNLOAD: u64 = 100_000_000;

#[test]
#[ignore = "needs root"]
fn given_downloads_and_requests_when_the_agent_is_killed_and_starts_again_then_nothing_is_lost() {
    let mut lab = Lab::start();
    let before = programs(&lab.gateway);
    let downloader = Client::new(&lab.topology.clients[1]);
    let [v4, v6] = vips(plan::WEB_PORT);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let downloads = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                let download = downloader.download(v4, DOWNLOAD)?;
                assert_eq!(download.bytes, DOWNLOAD);
                count += 1;
            }
            anyhow::Ok(count)
        });
        let kept = [v4, v6].map(|to| Sessions::open(&lab.client, to, 20).unwrap());
        let loads = [v4, v6].map(|to| Load::start(&lab.client, to, RATE / 2).unwrap());
        answers_more(&loads[0], GOES_ON / 2);

        lab.gateway.kill().unwrap();
        loads.iter().for_each(|load| answers_more(load, GOES_ON));
        lab.gateway.start().unwrap();
        loads.iter().for_each(|load| answers_more(load, GOES_ON));
        // Again, while probes are under way.
        lab.gateway.kill().unwrap();
        lab.gateway.start().unwrap();
        loads.iter().for_each(|load| answers_more(load, GOES_ON));

        done.store(true, Ordering::Relaxed);
        for outcome in loads.map(|load| load.stop().unwrap()) {
            assert_eq!((outcome.failed(), outcome.resets()), (0, 0), "{outcome}");
        }
        expect_all_go_on(kept);
        assert!(downloads.join().unwrap().unwrap() > 0, "no download was complete");
    });
    assert_eq!(programs(&lab.gateway), before, "the same build was put in its own place");
}

#[test]
#[ignore = "needs root"]
fn given_a_running_agent_when_it_is_told_to_end_then_packets_are_balanced_on_without_it() {
    let mut lab = Lab::start();
    lab.gateway.terminate().unwrap();
    assert!(lab.gateway.status().is_err(), "it still answers");

    for (tcp, udp) in vips(plan::WEB_PORT).into_iter().zip(vips(plan::UDP_PORT)) {
        for outcome in [lab.client.http(tcp, 200, 8).unwrap(), lab.client.udp(udp, 200, 8).unwrap()]
        {
            assert_eq!((outcome.ok(), outcome.failed()), (200, 0), "{tcp}: {outcome}");
            assert_eq!(outcome.per_backend.len(), 4, "{tcp}: {outcome}");
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_an_unhealthy_backend_when_the_agent_starts_again_then_it_stays_so_until_probes_say_more() {
    const DEAD: &str = "web-2";
    let mut lab = Lab::prepare();
    // Five seconds from its return until it is healthy again: more than the test takes.
    lab.gateway.configure(&plan::instances(&lab.topology, 10)).unwrap();
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    lab.server(DEAD, plan::WEB).stop();
    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "unhealthy");
    let [to, _] = vips(plan::WEB_PORT);
    let load = Load::start(&lab.client, to, RATE).unwrap();
    answers_more(&load, 100);

    lab.gateway.kill().unwrap();
    lab.server(DEAD, plan::WEB).restart().unwrap();
    lab.gateway.start().unwrap();
    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "unhealthy");
    lab.wait_health("tcp", plan::WEB_PORT, "web-1", "healthy");
    lab.wait_health("tcp", plan::API_PORT, DEAD, "healthy");
    answers_more(&load, GOES_ON);
    let kept = load.so_far();
    assert_eq!(kept.per_backend.get(DEAD), None, "new flows to the unhealthy: {kept}");

    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "healthy");
    answers_more(&load, GOES_ON);
    let end = expect_unscathed(load);
    assert!(end.per_backend.contains_key(DEAD), "no traffic after its return: {end}");
}

#[test]
#[ignore = "needs root"]
fn given_the_same_configuration_when_the_agent_starts_again_then_it_writes_nothing() {
    let mut lab = Lab::start();
    lab.gateway.terminate().unwrap();
    let (before, programs_before) = (Contents::read(&lab.gateway), programs(&lab.gateway));

    let log = lab.gateway.log();
    let reused = || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.matches("programs are loaded already").count()
    };
    assert_eq!(reused(), 0, "the first start loads them");
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();

    assert_eq!(reused(), 1, "the programs were loaded again");
    let after = Contents::read(&lab.gateway);
    assert!(before.listeners.len() == 12 && before.interfaces.len() == 2, "what was compared");
    assert_eq!(after.differences(&before), [""; 0]);
    assert_eq!(programs(&lab.gateway), programs_before, "the program was replaced by itself");
}
