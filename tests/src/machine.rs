//! A machine with systemd: Debian 12, booted by `systemd-nspawn` in a network namespace of the lab.
//!
//! Its file system is an overlay in memory over a directory that `cargo xtask setup` makes, so nothing in that is
//! changed. All mounts are in a mount namespace that ends with the machine.

use std::{
    fs::{self, File},
    io,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Netns, cgroup::Cgroup, interrupt, scratch::Scratch};

/// The machine's first file system, below the target directory.
pub const ROOT: &str = "machine/debian-12";

/// Bound on the boot, and on the shutdown.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at something that takes its time.
const POLL: Duration = Duration::from_millis(50);

/// What runs in the new mount namespace: `$1` is a directory of this machine alone, `$2` the first file system, `$3` the
/// network namespace, and the rest the directories of its control group.
///
/// The capabilities are what a real machine has and a container has not by default; bpffs is mounted as systemd mounts it
/// on a real one. What nspawn would leave under `/run` when it is killed goes with the mount namespace.
const BOOT: &str = r#"
set -e
scratch=$1 lower=$2 netns=$3
shift 3
for group; do echo 0 >"$group/cgroup.procs"; done
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
mount -t tmpfs tmpfs "$scratch/fs"
cd "$scratch/fs"
mkdir upper work root bpf
mount -t overlay -o "lowerdir=$lower,upperdir=upper,workdir=work" overlay root
mount -t bpf -o mode=0700 bpf bpf
exec systemd-nspawn --quiet --boot --register=no --keep-unit --console=pipe --notify-ready=yes \
    --directory="$PWD/root" --bind="$PWD/bpf:/sys/fs/bpf" --machine="${scratch##*/}" \
    --network-namespace-path="$netns" --system-call-filter='bpf perf_event_open' \
    --capability=CAP_BPF,CAP_PERFMON,CAP_NET_ADMIN,CAP_NET_RAW,CAP_SYS_ADMIN
"#;

/// A booted machine; dropping it shuts it down.
#[derive(Debug)]
pub struct Machine {
    nspawn: Child,
    leader: Pid,
    // After the process that uses them.
    scratch: Scratch,
    _cgroup: Cgroup,
}

impl Machine {
    /// Boots in `netns`; returns when systemd has started everything. The thread that calls this has to outlive it.
    ///
    /// # Errors
    ///
    /// The first file system is missing, or the machine does not boot; its console is in the error.
    pub fn boot(netns: &Netns) -> Result<Self> {
        let lower = root()?;
        let scratch = Scratch::create()?;
        fs::create_dir(scratch.path().join("fs")).context("creating a place to mount on")?;
        let cgroup = Cgroup::create()?;
        let notify = scratch.path().join("notify");
        let notified = UnixDatagram::bind(&notify).context("listening for the boot")?;
        notified.set_read_timeout(Some(POLL)).context("bounding a wait")?;

        let output = File::create(console(&scratch)).context("creating the console's file")?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation=private", "sh", "-c", BOOT, "sh"])
            .args([scratch.path(), &lower, &netns.path()])
            .args(cgroup.directories())
            .env("NOTIFY_SOCKET", &notify)
            // /proc/sys and /sys as a real machine has them.
            .env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "yes")
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing the console's file")?)
            .stderr(output);
        let mut nspawn = netns.spawn(&mut command)?;
        match booted(&mut nspawn, &notified) {
            Ok(leader) => Ok(Self { nspawn, leader, scratch, _cgroup: cgroup }),
            Err(error) => {
                nspawn.kill().and_then(|()| nspawn.wait()).context("ending nspawn")?;
                let said = fs::read_to_string(console(&scratch)).unwrap_or_default();
                Err(error.context(format!("the machine does not boot; its console:\n{said}")))
            }
        }
    }

    /// A file of the machine, as this process finds it. No part of `path` may be an absolute link.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new("/proc").join(self.leader.to_string()).join("root").join(&path[1..])
    }

    /// Runs a program in the machine as root, to its end.
    ///
    /// # Errors
    ///
    /// It cannot be started; how it ended is in the output.
    pub fn run(&self, args: &[&str]) -> Result<Output> {
        Command::new("nsenter")
            .args(["--target", &self.leader.to_string(), "--all", "--root", "--wd=/", "--"])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {args:?}"))
    }

    fn shut_down(&mut self) -> io::Result<()> {
        // nspawn passes it on to systemd as a request to power off.
        let pid = i32::try_from(self.nspawn.id()).expect("process ids fit into an i32");
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.nspawn.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(POLL);
        }
        self.nspawn.kill()?;
        self.nspawn.wait()?;
        Err(io::Error::other(format!("not done within {PATIENCE:?}, killed")))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let said = self.run(&["journalctl", "--no-pager", "--unit=slb", "--lines=100"]);
            let said = said.map(|output| output.stdout).unwrap_or_default();
            eprintln!("the machine's journal:\n{}", String::from_utf8_lossy(&said));
        }
        if let Err(error) = self.shut_down() {
            eprintln!("lab: shutting down {}: {error}", self.scratch.path().display());
        }
    }
}

fn console(scratch: &Scratch) -> PathBuf {
    scratch.path().join("console")
}

/// Waits until nspawn says that systemd is ready, and which process that is.
fn booted(nspawn: &mut Child, notified: &UnixDatagram) -> Result<Pid> {
    let deadline = Instant::now() + PATIENCE;
    let mut leader = None;
    let mut buffer = [0; 4096];
    while Instant::now() < deadline {
        interrupt::check()?;
        if let Some(status) = nspawn.try_wait().context("asking for nspawn")? {
            bail!("systemd-nspawn: {status}");
        }
        // Nothing within POLL.
        let Ok(len) = notified.recv(&mut buffer) else { continue };
        for line in String::from_utf8_lossy(&buffer[..len]).lines() {
            if let Some(pid) = line.strip_prefix("X_NSPAWN_LEADER_PID=") {
                leader = Some(Pid::from_raw(pid.parse().context("a process id")?));
            } else if line == "READY=1" {
                return leader.context("nspawn has not said which process systemd is");
            }
        }
    }
    bail!("not within {PATIENCE:?}")
}

/// The first file system; a test runs somewhere below the target directory.
fn root() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("where this program is")?;
    let roots = exe.ancestors().skip(1).map(|folder| folder.join(ROOT));
    roots.into_iter().find(|path| path.is_dir()).with_context(|| {
        format!("no {ROOT} in the target directory; `cargo xtask setup`, run as root, makes it")
    })
}
