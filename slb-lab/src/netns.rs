//! Network namespaces.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::naming;

const DIRECTORY: &str = "/run/netns";

/// A named network namespace; dropping it deletes it, and every device in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// A new, empty namespace whose name ends in `role`; its loopback device is up.
    ///
    /// # Errors
    ///
    /// Not root, or `ip` is missing.
    pub fn create(role: &str) -> Result<Self> {
        let name = format!("{}-{role}", naming::unique());
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let netns = Self { name };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// As `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds the namespace, for `nsenter --net=`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(DIRECTORY).join(&self.name)
    }

    /// Runs `f` inside.
    ///
    /// A namespace belongs to a thread, so `f` gets a thread of its own that ends with it: there is
    /// nothing to restore, and a panic cannot leave the caller in the wrong place.
    ///
    /// # Errors
    ///
    /// The namespace is gone, or may not be entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let file = self.open()?;
        thread::scope(|scope| {
            let inside = scope.spawn(|| enter(&file).map(|()| f()));
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread that stays inside.
    ///
    /// # Errors
    ///
    /// The namespace is gone, or no thread can be had.
    pub fn thread<T: Send + 'static>(
        &self,
        name: &str,
        f: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let file = self.open()?;
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || enter(&file).and_then(|()| f()))
            .with_context(|| format!("starting thread {name}"))
    }

    /// Starts a process inside. It is killed when the *thread* that called this ends: that is what
    /// the kernel offers for "dies with its parent". It leads a process group of its own: Ctrl-C
    /// reaches the lab only, which then ends things in their order.
    ///
    /// # Errors
    ///
    /// The program cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let file = self.open()?;
        let fd = file.as_raw_fd();
        let parent = std::process::id();
        let prepare = move || {
            // SAFETY: plain system calls; `file` outlives `spawn`, hence the descriptor is open.
            unsafe {
                if libc::setns(fd, libc::CLONE_NEWNET) != 0
                    || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                // The parent may have died before the line above.
                if u32::try_from(libc::getppid()) != Ok(parent) {
                    libc::_exit(1);
                }
            }
            Ok(())
        };
        // SAFETY: the closure makes async-signal-safe calls only and does not allocate.
        unsafe { command.process_group(0).pre_exec(prepare) };
        let child = command.spawn();
        drop(file);
        child.with_context(|| format!("starting {}", command.get_program().display()))
    }

    /// Lines for `ip -batch`, run inside.
    ///
    /// # Errors
    ///
    /// One of the lines fails; those before it took effect.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting ip")?;
        // Dropped at the end of the statement, which is the end of the batch.
        let written =
            child.stdin.take().map_or(Ok(()), |mut pipe| pipe.write_all(batch.as_bytes()));
        let output = child.wait_with_output().context("waiting for ip")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("ip -n {} -batch, of\n{batch}\n{}", self.name, said.trim());
        }
        written.context("writing to ip")
    }

    /// Sets `net.<key>` inside; `key` with slashes, as in `ipv4/ip_forward`.
    ///
    /// # Errors
    ///
    /// The kernel does not know the key or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        // procfs shows the namespace of the thread that opens the file.
        self.run(|| fs::write(format!("/proc/sys/net/{key}"), value))?
            .with_context(|| format!("setting net/{key} to {value} in {}", self.name))
    }

    /// Switches a device's offload, by the name that `ethtool -K` gives it.
    ///
    /// # Errors
    ///
    /// `ethtool` is missing or the device cannot do it.
    pub fn offload(&self, device: &str, feature: &str, on: bool) -> Result<()> {
        let value = if on { "on" } else { "off" };
        self.run(|| run(Command::new("ethtool").args(["-K", device, feature, value])))?
    }

    fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).with_context(|| format!("opening {}", path.display()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        delete(&self.name);
    }
}

/// Deletes the namespaces of labs whose process is gone.
pub(crate) fn remove_stale() {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
    for entry in entries.flatten() {
        if let Some(name) = entry.file_name().to_str()
            && naming::is_stale(name)
        {
            delete(name);
        }
    }
}

/// Never panics: the error that made the guard drop is the message worth reading.
fn delete(name: &str) {
    if let Err(error) = run(Command::new("ip").args(["netns", "delete", name])) {
        eprintln!("lab: {error:#}");
    }
}

fn enter(file: &File) -> Result<()> {
    setns(file, CloneFlags::CLONE_NEWNET).context("entering a network namespace")
}

/// Runs a program to its end; what it said on stderr is the error.
fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", command.get_program().display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}: {}", output.status, said.trim());
    }
    Ok(())
}
