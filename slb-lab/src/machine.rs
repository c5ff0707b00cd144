//! A machine with systemd: Debian 12, booted by `systemd-nspawn` in a network namespace of the lab.
//!
//! Its file system is an overlay in memory over a directory that `cargo xtask setup` makes, so nothing in that is
//! changed. Processes and mounts are in namespaces of the machine, so the kernel ends them with it, even if the test is
//! killed.

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

/// Bound on the boot.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at something that takes its time.
const POLL: Duration = Duration::from_millis(50);

/// What runs in the new namespaces: `$1` is a directory of this machine alone, `$2` the first file system, `$3` the
/// network namespace, and the rest the directories of its control group.
///
/// The capabilities are what a real machine has and a container has not by default; bpffs is mounted as systemd does on
/// a real one. What nspawn would leave under `/run` when it is killed goes with the mount namespace.
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

/// A booted machine; dropping it ends it.
#[derive(Debug)]
pub struct Machine {
    /// Makes the namespaces. nspawn, the first process of the process namespace, dies with it, and with nspawn all
    /// others.
    unshare: Child,
    nspawn: u32,
    /// systemd.
    leader: u32,
    // After the process that uses them.
    _scratch: Scratch,
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
            .args(["--mount", "--propagation=private", "--pid", "--mount-proc", "--fork"])
            .args(["--kill-child", "sh", "-c", BOOT, "sh"])
            .args([scratch.path(), &lower, &netns.path()])
            .args(cgroup.directories())
            .env("NOTIFY_SOCKET", &notify)
            // /proc/sys and /sys as a real machine has them.
            .env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "yes")
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("sharing the console's file")?)
            .stderr(output);
        let mut unshare = netns.spawn(&mut command)?;
        match booted(&mut unshare, &notified) {
            Ok([nspawn, leader]) => {
                Ok(Self { unshare, nspawn, leader, _scratch: scratch, _cgroup: cgroup })
            }
            Err(error) => {
                unshare.kill().and_then(|()| unshare.wait()).context("ending the machine")?;
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
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let journal = ["journalctl", "--no-pager", "--unit=slb", "--lines=100"];
            let said = self.run(&journal).map(|output| output.stdout).unwrap_or_default();
            eprintln!("the machine's journal:\n{}", String::from_utf8_lossy(&said));
        }
        // Not its parent: that waits for it, and ends.
        let nspawn =
            Pid::from_raw(i32::try_from(self.nspawn).expect("process ids fit into an i32"));
        let killed = kill(nspawn, Signal::SIGKILL).map_err(io::Error::from);
        if let Err(error) = killed.and_then(|()| self.unshare.wait()) {
            eprintln!("lab: ending a machine: {error}");
        }
    }
}

fn console(scratch: &Scratch) -> PathBuf {
    scratch.path().join("console")
}

/// Waits until nspawn says that systemd is ready; the processes of both.
fn booted(unshare: &mut Child, notified: &UnixDatagram) -> Result<[u32; 2]> {
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = [0; 4096];
    while Instant::now() < deadline {
        interrupt::check()?;
        if let Some(status) = unshare.try_wait().context("asking for the machine")? {
            bail!("systemd-nspawn: {status}");
        }
        // Nothing within POLL.
        let Ok(len) = notified.recv(&mut buffer) else { continue };
        if String::from_utf8_lossy(&buffer[..len]).lines().any(|line| line == "READY=1") {
            let nspawn = child(unshare.id())?;
            return Ok([nspawn, child(nspawn)?]);
        }
    }
    bail!("not within {PATIENCE:?}")
}

/// The only child of a process.
fn child(pid: u32) -> Result<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(&path).with_context(|| path.clone())?;
    children.trim().parse().with_context(|| format!("{path}: {children:?} is not one process"))
}

/// The first file system; a test runs somewhere below the target directory.
fn root() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("where this program is")?;
    let roots = exe.ancestors().skip(1).map(|folder| folder.join(ROOT));
    roots.into_iter().find(|path| path.is_dir()).with_context(|| {
        format!("no {ROOT} in the target directory; `cargo xtask setup`, run as root, makes it")
    })
}
