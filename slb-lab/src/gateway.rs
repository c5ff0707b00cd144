//! The program under test, on the gateway.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    net::IpAddr,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    Netns, Topology, interrupt,
    scratch::{PINS, Scratch},
    topology::INTERFACES,
};

/// Names the binary to run, instead of the one that was built beside this program.
pub const BINARY_VARIABLE: &str = "SLB_BIN";

/// Bound on the start of the agent, and on its orderly end.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at something that takes its time.
const POLL: Duration = Duration::from_millis(50);
/// Capacity of the flow table: more than a lab makes, and quick to create.
const FLOWS: u32 = 262_144;
/// How much of the log goes into an error.
const TAIL: i64 = 4096;

/// `slb` on the gateway of a [`Topology`], with its own configuration, pins and socket.
///
/// Dropping it ends the agent, runs `slb unload`, and removes what is left.
#[derive(Debug)]
pub struct Gateway {
    binary: PathBuf,
    agent: Option<Child>,
    scratch: Scratch,
    netns: Arc<Netns>,
}

impl Gateway {
    /// Nothing runs yet. `instances` is the configuration without `[gateway]`, which the lab
    /// writes itself.
    ///
    /// # Errors
    ///
    /// There is no binary, or the directory cannot be made.
    pub fn new(topology: &Topology, instances: &str) -> Result<Self> {
        let gateway = Self {
            binary: binary()?,
            agent: None,
            scratch: Scratch::create()?,
            netns: Arc::clone(&topology.gateway),
        };
        fs::create_dir(gateway.pins()).context("creating the directory for pins")?;
        gateway.configure(instances)?;
        Ok(gateway)
    }

    /// Writes the file again; a running agent has to be told by `slb reload`.
    ///
    /// # Errors
    ///
    /// The disk is full.
    pub fn configure(&self, instances: &str) -> Result<()> {
        let gateway = format!(
            "[gateway]\n\
             interfaces = {INTERFACES:?}\n\
             flows      = {FLOWS}\n\
             announce   = \"arp\"\n\
             api        = {:?}\n\
             pins       = \"{}\"\n\n",
            self.scratch.path().join("api.sock").display(),
            self.pins().display(),
        );
        fs::write(self.config(), gateway + instances)
            .with_context(|| format!("writing {}", self.config().display()))
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.scratch.path().join("slb.toml")
    }

    /// What the agent says, from its first start on.
    pub fn log(&self) -> PathBuf {
        self.scratch.path().join("slb.log")
    }

    /// Where bpffs is mounted and everything is pinned.
    pub fn pins(&self) -> PathBuf {
        self.scratch.path().join(PINS)
    }

    /// The binary that is run.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Starts the agent; returns when it answers. The thread that calls this has to outlive it.
    ///
    /// # Errors
    ///
    /// It ends, or does not answer in time; the end of its log is in the error.
    pub fn start(&mut self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .with_context(|| format!("opening {}", self.log().display()))?;
        let shared = log.try_clone().context("sharing the log")?;
        self.start_with(|command| {
            command.stdout(shared).stderr(log);
        })
    }

    /// As [`start`](Self::start); where output goes, and what limits there are, `prepare` says.
    ///
    /// # Errors
    ///
    /// Those of [`start`](Self::start).
    pub fn start_with(&mut self, prepare: impl FnOnce(&mut Command)) -> Result<()> {
        let mut command = self.command(&["run"]);
        prepare(&mut command);
        self.agent = Some(self.netns.spawn(&mut command)?);
        // With the command go the descriptors that the agent has been given.
        drop(command);

        let deadline = Instant::now() + PATIENCE;
        loop {
            interrupt::check()?;
            if let Some(status) = self.exited()? {
                self.agent = None;
                bail!("slb run: {status}; the end of its log:\n{}", self.log_tail());
            }
            if self.slb(&["status", "--json"])?.status.success() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("slb run does not answer; the end of its log:\n{}", self.log_tail());
            }
            thread::sleep(POLL);
        }
    }

    /// SIGKILL: the agent dies as in a crash.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut agent = self.agent.take().context("the agent does not run")?;
        agent.kill().context("killing the agent")?;
        agent.wait().context("waiting for the agent")?;
        Ok(())
    }

    /// SIGTERM: the agent ends as it does under systemd.
    ///
    /// # Errors
    ///
    /// It does not run, ends with an error, or does not end in time and is killed.
    pub fn terminate(&mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.exited()? {
                self.agent = None;
                // Before its handler is installed a signal ends it by itself.
                if !status.success() && status.signal() != Some(libc::SIGTERM) {
                    bail!("slb run: {status}; the end of its log:\n{}", self.log_tail());
                }
                return Ok(());
            }
            thread::sleep(POLL);
        }
        self.kill()?;
        bail!("slb run did not end on SIGTERM; the end of its log:\n{}", self.log_tail());
    }

    /// Sends the agent a signal.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let agent = self.agent.as_ref().context("the agent does not run")?;
        let pid = i32::try_from(agent.id()).context("process ids fit into an i32")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal}"))
    }

    /// Process id of the agent.
    pub fn pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    /// Runs `slb ARGS --config FILE` on the gateway, to its end.
    ///
    /// # Errors
    ///
    /// It cannot be started; how it ended is in the output.
    pub fn slb(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        self.netns.spawn(&mut command)?.wait_with_output().context("waiting for slb")
    }

    /// `slb status --json`.
    ///
    /// # Errors
    ///
    /// No agent answers, or not with JSON.
    pub fn status(&self) -> Result<Value> {
        let output = self.slb(&["status", "--json"])?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("slb status: {}: {}", output.status, said.trim());
        }
        serde_json::from_slice(&output.stdout).context("what slb status --json printed")
    }

    /// Asks for the status until `reached` holds; says how long that took.
    ///
    /// # Errors
    ///
    /// It does not hold within `limit`, no agent answers, or a signal arrived.
    pub fn wait(
        &self,
        what: &str,
        limit: Duration,
        reached: impl Fn(&Value) -> bool,
    ) -> Result<Duration> {
        let began = Instant::now();
        loop {
            interrupt::check()?;
            let status = self.status()?;
            if reached(&status) {
                return Ok(began.elapsed());
            }
            if began.elapsed() > limit {
                bail!("{what}: not within {limit:?}; the last status was\n{status:#}");
            }
            thread::sleep(POLL);
        }
    }

    /// `slb ARGS --config FILE`, which [`Netns::spawn`] starts on the gateway.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args).arg("--config").arg(self.config()).stdin(Stdio::null());
        command
    }

    fn exited(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.agent {
            Some(agent) => agent.try_wait().context("asking for the agent"),
            None => Ok(None),
        }
    }

    fn log_tail(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(self.log())?;
            let length = i64::try_from(file.metadata()?.len()).unwrap_or(i64::MAX);
            file.seek(SeekFrom::End(-length.min(TAIL)))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_else(|error| format!("({error})"))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if self.agent.is_some()
            && let Err(error) = self.terminate()
        {
            eprintln!("lab: {error:#}");
        }
        match self.slb(&["unload"]) {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                eprintln!("lab: slb unload: {}: {}", output.status, said.trim());
            }
            Err(error) => eprintln!("lab: {error:#}"),
        }
    }
}

/// The entries of `slb status --json` for every backend of the listener at `protocol` and `port`.
pub fn backends<'a>(status: &'a Value, protocol: &str, port: u16) -> Vec<&'a Value> {
    items(&status["instances"])
        .flat_map(|instance| items(&instance["listeners"]))
        .filter(|listener| listener["protocol"] == protocol && listener["port"] == port)
        .flat_map(|listener| items(&listener["backends"]))
        .collect()
}

/// Health of the backend `name` of that listener, at `address`.
pub fn health<'a>(
    status: &'a Value,
    protocol: &str,
    port: u16,
    name: &str,
    address: IpAddr,
) -> Option<&'a str> {
    backends(status, protocol, port)
        .into_iter()
        .find(|backend| {
            let endpoint = backend["endpoint"].as_str().and_then(|text| text.parse().ok());
            backend["name"] == name
                && endpoint.is_some_and(|endpoint: std::net::SocketAddr| endpoint.ip() == address)
        })
        .and_then(|backend| backend["health"].as_str())
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The binary that a [`Gateway`] runs.
///
/// # Errors
///
/// There is none.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY_VARIABLE) {
        return Ok(path.into());
    }
    // A test runs in `<profile>/deps`, anything else in `<profile>`.
    let exe = std::env::current_exe().context("where this program is")?;
    let beside = exe.ancestors().skip(1).take(2).map(|folder| folder.join("slb"));
    beside.into_iter().find(|path| path.is_file()).with_context(|| {
        format!(
            "no binary `slb` near {}: `cargo build -p slb-user` makes it, and {BINARY_VARIABLE} \
             can name another",
            exe.display()
        )
    })
}
