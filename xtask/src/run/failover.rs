//! What happens when a backend stops.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use slb_lab::{
    Failure, Lab, Load, Sessions, gateway, interrupt,
    plan::{self, PRIMARY, SECONDARY},
};

use super::{NOTICED, report::Report};

/// Requests that show where traffic goes.
const SAMPLE: usize = 200;
/// Kept connections per address family.
const KEPT: usize = 40;
/// New connections per second while a backend is stopped.
const RATE: u32 = 200;
/// Answers that show that the load goes on: two seconds of it.
const GOES_ON: u64 = 400;
/// Answers after which no request of before is still under way.
const SETTLED: u64 = 20;

const STOPPED: &str = "web-2";

/// Stops the primary of a primary/secondary group, and starts it again.
pub(super) fn primary_and_secondary(lab: &mut Lab, report: &mut Report) -> Result<()> {
    let port = plan::DB_PORT;
    report.step(&format!("Primary and secondary: {PRIMARY} and {SECONDARY} behind tcp/{port}"));
    expect(lab, report, PRIMARY)?;

    report.step(&format!("The primary, {PRIMARY}, is stopped"));
    let stopped = Instant::now();
    lab.server(PRIMARY, plan::DB)?.stop();
    lab.wait_health(("tcp", port), PRIMARY, "unhealthy", NOTICED)?;
    wait_active(lab, SECONDARY)?;
    report.seen(&format!("unhealthy {} ms after it was stopped", stopped.elapsed().as_millis()));
    expect(lab, report, SECONDARY)?;

    report.step(&format!("The primary, {PRIMARY}, is started again"));
    let started = Instant::now();
    lab.server(PRIMARY, plan::DB)?.restart()?;
    lab.wait_health(("tcp", port), PRIMARY, "healthy", NOTICED)?;
    wait_active(lab, PRIMARY)?;
    report.seen(&format!("healthy {} ms after it was started", started.elapsed().as_millis()));
    expect(lab, report, PRIMARY)
}

/// Waits until new flows go to `name`, over both families.
fn wait_active(lab: &Lab, name: &str) -> Result<Duration> {
    lab.gateway.wait(&format!("{name} active on tcp/{}", plan::DB_PORT), NOTICED, |status| {
        gateway::backends(status, "tcp", plan::DB_PORT)
            .into_iter()
            .all(|backend| backend["active"] == (backend["name"] == name))
    })
}

/// All new connections to the primary/secondary group go to `name`.
fn expect(lab: &Lab, report: &mut Report, name: &str) -> Result<()> {
    for to in plan::vips(plan::DB_PORT) {
        let outcome = lab.client.http(to, SAMPLE, 8)?;
        interrupt::check()?;
        let all = u64::try_from(SAMPLE)?;
        let holds = outcome.per_backend.get(name) == Some(&all);
        report.check(holds, &format!("{to}: all of {SAMPLE} to {name} ({outcome})"));
    }
    Ok(())
}

/// Stops one backend of a weighted group under load, and starts it again.
pub(super) fn weighted(lab: &mut Lab, report: &mut Report) -> Result<()> {
    let port = plan::WEB_PORT;
    let [v4, v6] = plan::vips(port);
    report.step(&format!(
        "Weighted group behind tcp/{port}: {} connections are kept busy, {RATE} new ones come per \
         second",
        2 * KEPT
    ));
    let kept = [Sessions::open(&lab.client, v4, KEPT)?, Sessions::open(&lab.client, v6, KEPT)?];
    let load = Load::start(&lab.client, v4, RATE)?;
    answers_more(&load, GOES_ON)?;
    let before = load.so_far();
    report.check(before.failed() == 0, &format!("before: {before}"));

    report.step(&format!("{STOPPED} is stopped"));
    let stopped = Instant::now();
    lab.server(STOPPED, plan::WEB)?.stop();
    lab.wait_health(("tcp", port), STOPPED, "unhealthy", NOTICED)?;
    report.seen(&format!("unhealthy {} ms after it was stopped", stopped.elapsed().as_millis()));
    answers_more(&load, SETTLED)?;
    let noticed = load.so_far();
    report.seen(&format!(
        "until then {} new connections were sent to it and failed",
        noticed.failed() - before.failed()
    ));
    answers_more(&load, GOES_ON)?;
    let after = load.so_far();
    let count = |outcome: &slb_lab::Outcome| outcome.per_backend.get(STOPPED).copied();
    report.check(
        after.failed() == noticed.failed() && count(&after) == count(&noticed),
        &format!(
            "since then {} new connections: {} failed, none to {STOPPED}",
            after.ok() - noticed.ok(),
            after.failed() - noticed.failed()
        ),
    );

    report.step(&format!("{STOPPED} is started again"));
    let started = Instant::now();
    lab.server(STOPPED, plan::WEB)?.restart()?;
    lab.wait_health(("tcp", port), STOPPED, "healthy", NOTICED)?;
    report.seen(&format!("healthy {} ms after it was started", started.elapsed().as_millis()));
    answers_more(&load, SETTLED)?;
    let settled = load.so_far();
    answers_more(&load, GOES_ON)?;
    let end = load.stop()?;
    report.check(count(&end) > count(&settled), &format!("{STOPPED} gets new connections again"));
    report.check(end.failed() == noticed.failed(), "no new connection failed on its return");

    judge_kept(kept, report)
}

/// Only the stopped backend may lose the connections that are kept busy.
fn judge_kept(kept: [Sessions; 2], report: &mut Report) -> Result<()> {
    let (mut own, mut others) = (Vec::new(), Vec::new());
    for sessions in kept {
        for session in sessions.stop()? {
            if session.backend == STOPPED { own.push(session) } else { others.push(session) }
        }
    }
    let answered: u64 = others.iter().map(|session| session.answered).sum();
    let broken = others.iter().filter(|session| session.failure.is_some()).count();
    report.check(
        broken == 0 && !others.is_empty(),
        &format!(
            "{} kept connections to the other backends: {answered} requests answered all along, \
             {broken} connections failed",
            others.len()
        ),
    );
    let closed = own.iter().filter(|session| session.failure == Some(Failure::Reset)).count();
    report.seen(&format!("{closed} of {} kept connections to {STOPPED} were closed", own.len()));
    Ok(())
}

/// Waits until `load` has had `more` answers.
fn answers_more(load: &Load, more: u64) -> Result<()> {
    let wanted = load.so_far().ok() + more;
    let deadline = Instant::now() + NOTICED;
    while load.so_far().ok() < wanted {
        interrupt::check()?;
        if Instant::now() > deadline {
            bail!("the load does not get its answers: {}", load.so_far());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
