//! What the tests have in common: a lab with everything running, and ways to look at it.

pub(crate) mod attack;
pub(crate) mod claims;
pub(crate) mod foreign;
pub(crate) mod killer;
pub(crate) mod maps;
pub(crate) mod proxies;
pub(crate) mod raw;
pub(crate) mod talk;

use std::{
    net::SocketAddr,
    ops::{Deref, DerefMut},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
pub(crate) use slb_lab::plan;
use slb_lab::{Gateway, Host, Load, Netns, Outcome, Server, Sessions, gateway};

/// Bound on what the agent notices, and on what a loaded machine takes.
pub(crate) const NOTICED: Duration = Duration::from_secs(15);
/// Less than the second after which TCP sends a lost SYN again.
pub(crate) const AT_ONCE: Duration = Duration::from_millis(900);
/// Between two looks.
const POLL: Duration = Duration::from_millis(10);

/// Waits until each of these listeners, by protocol and port, has so many backends, all of them healthy.
pub(crate) fn wait_healthy(gateway: &Gateway, listeners: &[(&str, u16)], count: usize) {
    let are_healthy = |status: &Value| {
        listeners.iter().all(|&(protocol, port)| {
            let found = gateway::backends(status, protocol, port);
            found.len() == count && found.iter().all(|backend| backend["health"] == "healthy")
        })
    };
    gateway.wait("all backends healthy", NOTICED, are_healthy).unwrap();
}

/// A [`slb_lab::Lab`] whose methods panic.
pub(crate) struct Lab(slb_lab::Lab);

impl Deref for Lab {
    type Target = slb_lab::Lab;

    fn deref(&self) -> &slb_lab::Lab {
        &self.0
    }
}

impl DerefMut for Lab {
    fn deref_mut(&mut self) -> &mut slb_lab::Lab {
        &mut self.0
    }
}

impl Lab {
    /// All of [`plan`], and every backend found healthy.
    pub(crate) fn start() -> Self {
        let mut lab = Self::prepare();
        lab.gateway.start().unwrap();
        lab.wait_all_healthy();
        lab
    }

    /// All of [`plan`], but the agent does not run yet.
    pub(crate) fn prepare() -> Self {
        Self(slb_lab::Lab::prepare().unwrap())
    }

    /// The server of `service` on the host `name`.
    pub(crate) fn server(&mut self, name: &str, service: slb_lab::Service) -> &mut Server {
        self.0.server(name, service).unwrap()
    }

    /// The host `name`.
    pub(crate) fn host(&self, name: &str) -> &Host {
        self.0.host(name).unwrap()
    }

    pub(crate) fn wait_all_healthy(&self) {
        self.0.wait_all_healthy(NOTICED).unwrap();
    }

    /// Waits until the backend `name` has `health`, at both of its addresses.
    pub(crate) fn wait_health(&self, protocol: &str, port: u16, name: &str, health: &str) {
        self.0.wait_health((protocol, port), name, health, NOTICED).unwrap();
    }

    /// Replaces a part of the configuration file, which has to be there.
    pub(crate) fn edit(&self, from: &str, to: &str) {
        edit(&self.gateway, from, to);
    }
}

/// Changes a text in the configuration file.
pub(crate) fn edit(gateway: &Gateway, from: &str, to: &str) {
    let path = gateway.config();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from:?} is not in\n{text}");
    std::fs::write(&path, text.replace(from, to)).unwrap();
}

/// Has XDP run above the driver.
pub(crate) fn make_generic(gateway: &Gateway) {
    edit(gateway, "announce ", "xdp_mode   = \"generic\"\nannounce ");
}

/// Polls until `reached`.
pub(crate) fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + NOTICED;
    while !reached() {
        assert!(Instant::now() < deadline, "{what}: not within {NOTICED:?}");
        thread::sleep(POLL);
    }
}

/// Waits until `load` has had `more` answers.
pub(crate) fn answers_more(load: &Load, more: u64) {
    let wanted = load.so_far().ok() + more;
    wait_until("the load gets its answers", || load.so_far().ok() >= wanted);
}

/// Ends held connections, none of which may have failed.
pub(crate) fn expect_all_go_on(kept: impl IntoIterator<Item = Sessions>) {
    for session in kept.into_iter().flat_map(|kept| kept.stop().unwrap()) {
        assert_eq!(session.failure, None, "{session:?}");
    }
}

/// Ends `load`, of which every request has to have been answered at once.
pub(crate) fn expect_unscathed(load: Load) -> Outcome {
    let exchanges = load.stop_with_exchanges().unwrap();
    let mut outcome = Outcome::default();
    for exchange in exchanges {
        assert!(exchange.took < AT_ONCE, "a packet was lost: {exchange:?}");
        outcome.record(exchange.result);
    }
    assert_eq!((outcome.failed(), outcome.resets()), (0, 0), "{outcome}");
    outcome
}

/// Flows that the backend `name` was given so far, at its addresses of the family of `vip`.
pub(crate) fn flows(status: &Value, protocol: &str, vip: SocketAddr, name: &str) -> u64 {
    gateway::backends(status, protocol, vip.port())
        .into_iter()
        .filter(|backend| {
            let endpoint: SocketAddr = backend["endpoint"].as_str().unwrap().parse().unwrap();
            backend["name"] == name && endpoint.is_ipv4() == vip.is_ipv4()
        })
        .map(|backend| backend["flows"].as_u64().unwrap())
        .sum()
}

/// What a program prints, run inside `netns`; panics if it fails.
pub(crate) fn output(netns: &Netns, program: &str, args: &[&str]) -> String {
    let output = netns.run(|| Command::new(program).args(args).output()).unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}: {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}
