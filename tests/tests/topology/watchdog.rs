//! What the agent reports to a service manager.

use std::{
    os::unix::net::UnixDatagram,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::{
        ptrace,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use slb_lab::{Gateway, Topology};
use tempfile::TempDir;

use crate::support::{NOTICED, plan};

/// What the manager allows; a report is due twice as often.
const LIMIT: Duration = Duration::from_millis(200);
/// Without a report for so long, there will be none.
const SILENT: Duration = Duration::from_secs(2);

#[test]
#[ignore = "needs root"]
fn hung_loop_is_not_reported_alive() {
    let manager = Manager::start(None);
    manager.expect("READY=1\n");
    for _ in 0..3 {
        manager.expect("WATCHDOG=1\n");
    }

    // The agent's loop is in the first thread; all others go on.
    let thread = Pid::from_raw(i32::try_from(manager.agent.id()).unwrap());
    ptrace::seize(thread, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
    // Two may have been under way.
    let late = std::iter::from_fn(|| manager.receive(SILENT)).take(10).count();
    assert!(late <= 2, "{late} reports of an agent that does nothing");

    ptrace::detach(thread, None).unwrap();
    manager.expect("WATCHDOG=1\n");
}

#[test]
#[ignore = "needs root"]
fn nothing_is_reported_for_another_process() {
    let manager = Manager::start(Some("1"));
    manager.expect("READY=1\n");
    assert_eq!(manager.receive(SILENT), None);
}

/// What a service manager is to the agent. The order of the fields is the order in which it ends.
struct Manager {
    agent: Agent,
    socket: UnixDatagram,
    _folder: TempDir,
    _gateway: Gateway,
    _topology: Topology,
}

impl Manager {
    /// Starts an agent; the watchdog is for `watched`, if not for any process.
    fn start(watched: Option<&str>) -> Self {
        let topology = Topology::build().unwrap();
        let instances = plan::instances(&topology, plan::HEALTHY);
        let gateway = Gateway::new(&topology, &instances).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut command = Command::new(gateway.binary());
        command.args(["run", "--config"]).arg(gateway.config());
        command.env("NOTIFY_SOCKET", path).env("WATCHDOG_USEC", LIMIT.as_micros().to_string());
        if let Some(pid) = watched {
            command.env("WATCHDOG_PID", pid);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let agent = Agent(topology.gateway.spawn(&mut command).unwrap());
        Self { agent, socket, _folder: folder, _gateway: gateway, _topology: topology }
    }

    fn expect(&self, message: &str) {
        assert_eq!(self.receive(NOTICED).as_deref(), Some(message));
    }

    /// The next message, if there is one in time.
    fn receive(&self, limit: Duration) -> Option<String> {
        let mut buffer = [0; 256];
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let len = self.socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..len]).into_owned())
    }
}

struct Agent(Child);

impl Agent {
    fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}
