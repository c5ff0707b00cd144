//! The agent dies at any call that changes something: packets go on by what was in force or by what was to be, and the
//! next start completes it.

use std::{
    env, fs,
    ops::ControlFlow::{self, Break, Continue},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use slb_lab::Sessions;

use crate::support::{
    Lab, NOTICED, expect_all_go_on,
    killer::Tracee,
    plan::{self, vips},
};

/// Set to anything, it has the agent die at every call; otherwise at one of [`STRIDE`], for the time that it takes.
const EVERY: &str = "SLB_DEATHS";
/// A prime, so that it does not keep step with what comes for each backend or family.
const STRIDE: usize = 43;
const POLL: Duration = Duration::from_millis(10);

/// Calls `die` with 1, and so on, until it says that the agent has lived. Says at how many calls it died.
fn deaths(stride: usize, mut die: impl FnMut(u64) -> ControlFlow<()>) {
    let stride = if env::var_os(EVERY).is_some() { 1 } else { stride };
    let mut died = 0;
    for at in (1..).step_by(stride) {
        if die(at).is_break() {
            break;
        }
        died += 1;
    }
    println!("it died {died} times");
    assert!(died > 0, "it made no call that changes something");
}

impl Lab {
    /// `slb ARGS`, killed at its `at`-th call.
    fn traced(&self, args: &[&str], at: u64) -> Tracee {
        let mut command: Command = self.gateway.command(args);
        let log = fs::File::options().append(true).create(true).open(self.gateway.log()).unwrap();
        command.stdout(Stdio::null()).stderr(log);
        Tracee::start(&self.topology.gateway, command, at)
    }

    /// The running agent, traced; nothing kills it yet.
    fn traced_agent(&self) -> Tracee {
        let agent = self.traced(&["run"], u64::MAX);
        assert!(self.is_up(&agent), "the agent has ended");
        self.wait_all_healthy();
        agent
    }

    /// Waits until the agent answers; false if it ends instead.
    fn is_up(&self, agent: &Tracee) -> bool {
        let deadline = Instant::now() + 2 * NOTICED;
        while !agent.is_gone() {
            if self.gateway.status().is_ok() {
                return true;
            }
            assert!(Instant::now() < deadline, "the agent neither answers nor ends");
            thread::sleep(POLL);
        }
        false
    }

    /// Every request is answered, and by all backends.
    fn expect_traffic(&self, what: &str) {
        for to in vips(plan::WEB_PORT) {
            let outcome = self.client.http(to, 100, 8).unwrap();
            assert_eq!((outcome.ok(), outcome.failed()), (100, 0), "{what}, {to}: {outcome}");
        }
    }

    /// Nothing is left to do for an agent that starts now.
    fn expect_restart(&mut self, what: &str) {
        self.gateway.start().unwrap_or_else(|error| panic!("{what}: {error:#}"));
        self.wait_all_healthy();
        self.expect_traffic(what);
        let problems = self.gateway.status().unwrap()["problems"].clone();
        assert_eq!(problems, serde_json::json!([]), "{what}");
    }
}

/// Ends a traced agent that has done what it was asked for.
fn end(agent: Tracee) {
    agent.signal(Signal::SIGKILL);
    agent.ended();
}

#[test]
#[ignore = "needs root"]
fn given_nothing_when_the_first_start_dies_then_the_next_one_serves() {
    let mut lab = Lab::prepare();
    deaths(STRIDE, |at| {
        let agent = lab.traced(&["run"], at);
        if lab.is_up(&agent) {
            end(agent);
            return Break(());
        }
        let what = format!("at call {at}, {:?}", agent.ended());
        lab.expect_restart(&what);
        lab.gateway.terminate().unwrap();
        assert!(lab.gateway.slb(&["unload"]).unwrap().status.success(), "{what}");
        Continue(())
    });
}

#[test]
#[ignore = "needs root"]
fn given_connections_when_a_restart_dies_then_they_and_new_ones_go_on() {
    let mut lab = Lab::start();
    let kept = vips(plan::API_PORT).map(|to| Sessions::open(&lab.client, to, 20).unwrap());
    lab.gateway.terminate().unwrap();
    deaths(1, |at| {
        let agent = lab.traced(&["run"], at);
        if lab.is_up(&agent) {
            end(agent);
            return Break(());
        }
        let what = format!("at call {at}, {:?}", agent.ended());
        lab.expect_traffic(&what);
        lab.expect_restart(&what);
        lab.gateway.terminate().unwrap();
        Continue(())
    });
    expect_all_go_on(kept);
}

#[test]
#[ignore = "needs root"]
fn given_connections_when_a_reload_dies_then_they_go_on_and_the_next_start_has_the_file() {
    let mut lab = Lab::start();
    let kept = vips(plan::API_PORT).map(|to| Sessions::open(&lab.client, to, 20).unwrap());
    lab.gateway.terminate().unwrap();
    let plain = fs::read_to_string(lab.gateway.config()).unwrap();
    // Another listener and scheduler, and other weights: records, schedules and addresses change.
    let other = plain.replace("weight = 20", "weight = 80").replace("\"wrr\"", "\"tch\"")
        + "[[instance.listener]]\nprotocol = \"tcp\"\nport = 8088\ngroup = \"api\"\n\
           health_check.enabled = false\n";
    deaths(11, |at| {
        fs::write(lab.gateway.config(), &plain).unwrap();
        let agent = lab.traced_agent();
        fs::write(lab.gateway.config(), &other).unwrap();
        agent.kill_at(at);
        let reloaded = lab.gateway.slb(&["reload"]).unwrap();
        if reloaded.status.success() {
            end(agent);
            return Break(());
        }
        let what = format!("at call {at}, {:?}", agent.ended());
        lab.expect_traffic(&what);
        lab.expect_restart(&what);
        let [v4, _] = vips(8088);
        let outcome = lab.client.http(v4, 20, 4).unwrap();
        assert_eq!(outcome.ok(), 20, "{what}: the new listener: {outcome}");
        lab.gateway.terminate().unwrap();
        Continue(())
    });
    expect_all_go_on(kept);
}

#[test]
#[ignore = "needs root"]
fn given_a_dead_backend_when_the_agent_dies_over_it_then_the_next_start_takes_it_out() {
    const DEAD: &str = "web-2";
    let mut lab = Lab::prepare();
    deaths(5, |at| {
        let agent = lab.traced_agent();
        agent.kill_at(at);
        lab.server(DEAD, plan::WEB).stop();
        let deadline = Instant::now() + NOTICED;
        let is_out = || {
            let status = lab.gateway.status().ok()?;
            let backends = slb_lab::gateway::backends(&status, "tcp", plan::WEB_PORT);
            let mut dead = backends.into_iter().filter(|backend| backend["name"] == DEAD);
            Some(dead.all(|backend| backend["health"] == "unhealthy"))
        };
        while !agent.is_gone() && is_out() != Some(true) {
            assert!(Instant::now() < deadline, "the backend is neither out nor the agent gone");
            thread::sleep(POLL);
        }
        let lives = !agent.is_gone();
        if lives {
            agent.signal(Signal::SIGKILL);
        }
        let what = format!("at call {at}, {:?}", agent.ended());
        lab.gateway.start().unwrap_or_else(|error| panic!("{what}: {error:#}"));
        lab.wait_health("tcp", plan::WEB_PORT, DEAD, "unhealthy");
        lab.expect_traffic(&what);
        lab.server(DEAD, plan::WEB).restart().unwrap();
        lab.wait_all_healthy();
        lab.gateway.terminate().unwrap();
        if lives { Break(()) } else { Continue(()) }
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_edit_when_the_agent_dies_then_the_file_is_the_old_or_the_new_one() {
    let mut lab = Lab::start();
    lab.gateway.terminate().unwrap();
    let before = fs::read_to_string(lab.gateway.config()).unwrap();
    deaths(2, |at| {
        fs::write(lab.gateway.config(), &before).unwrap();
        let agent = lab.traced_agent();
        agent.kill_at(at);
        let edited = lab.gateway.slb(&["backend", "weight", "lab", "web-2", "77"]).unwrap();
        let after = fs::read_to_string(lab.gateway.config()).unwrap();
        if edited.status.success() {
            assert!(after.contains("weight = 77"));
            end(agent);
            return Break(());
        }
        let what = format!("at call {at}, {:?}", agent.ended());
        assert!(after == before || after.contains("weight = 77"), "{what}:\n{after}");
        lab.expect_traffic(&what);
        lab.expect_restart(&what);
        lab.gateway.terminate().unwrap();
        Continue(())
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_unload_when_it_dies_then_the_next_one_completes_it() {
    let mut lab = Lab::prepare();
    deaths(17, |at| {
        lab.gateway.start().unwrap();
        lab.gateway.terminate().unwrap();
        let what = match lab.traced(&["unload"], at).ended() {
            Some(call) => format!("at call {at}, {call}"),
            None => return Break(()),
        };
        let again = lab.gateway.slb(&["unload"]).unwrap();
        let said = String::from_utf8_lossy(&again.stderr);
        assert!(again.status.success(), "{what}: {said}");
        // The kernel makes two files in each bpffs.
        let of_kernel = ["maps.debug", "progs.debug"];
        let left =
            fs::read_dir(lab.gateway.pins()).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> =
            left.filter(|name| of_kernel.iter().all(|known| name != known)).collect();
        assert!(left.is_empty(), "{what}: {left:?}");
        Continue(())
    });
}
