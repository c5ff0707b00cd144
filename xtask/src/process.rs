//! Other programs.

use std::{
    ffi::OsStr,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// The `cargo` that runs this program.
pub(crate) fn cargo<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args);
    command
}

/// Shows a command and runs it to its end.
///
/// # Errors
///
/// It cannot be started, or fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", text(command));
    let status = command.status().with_context(|| text(command))?;
    if !status.success() {
        bail!("{}: {status}", text(command));
    }
    Ok(())
}

/// [`run`], but a command that is not done within `limit` is killed and has failed.
///
/// # Errors
///
/// As those of [`run`].
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> Result<()> {
    println!("$ {}", text(command));
    let mut child = command.stdin(Stdio::null()).spawn().with_context(|| text(command))?;
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().with_context(|| text(command))? {
            if !status.success() {
                bail!("{}: {status}", text(command));
            }
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    child.kill().and_then(|()| child.wait()).with_context(|| text(command))?;
    bail!("{}: not done within {limit:?}", text(command));
}

/// What a command prints on stdout; `None` if it cannot be started or fails.
pub(crate) fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where a program is, if it is on the PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Where cargo installs programs (below, in `bin`).
pub(crate) fn cargo_home() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}

/// Whether this process may make namespaces, load programs and install packages.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Builds the agent with its eBPF object, in release mode, and returns the path of `slb`.
///
/// # Errors
///
/// It does not compile.
pub(crate) fn build_slb() -> Result<PathBuf> {
    run(&mut cargo(["build", "--release", "--package", "slb-user"]))?;
    Ok(target()?.join("release/slb"))
}

/// The target directory.
///
/// # Errors
///
/// This program is not where cargo has put it.
pub(crate) fn target() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("where this program is")?;
    // This program is `<target>/<profile>/xtask`.
    let target = exe.ancestors().nth(2).context("this program is not in a target directory")?;
    Ok(target.to_owned())
}

/// Runs a cargo command that builds, and gives what it says about what it has built.
///
/// # Errors
///
/// It does not compile.
pub(crate) fn build<const N: usize>(args: [&str; N]) -> Result<Vec<Value>> {
    let mut command = cargo(args);
    println!("$ {}", text(&command));
    command.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = command.output().with_context(|| text(&command))?;
    if !output.status.success() {
        bail!("{}: {}", text(&command), output.status);
    }
    let lines = output.stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).context("a message of cargo's")).collect()
}

/// A command as it would be typed, with the variables set for it.
pub(crate) fn text(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(key, value)| {
        value.map(|value| format!("{}={}", key.display(), value.display()))
    });
    // `CARGO` is an absolute path, which users do not type.
    let program = PathBuf::from(command.get_program());
    let program = program.file_name().unwrap_or_default().display().to_string();
    let args = command.get_args().map(|arg| arg.display().to_string());
    variables.chain([program]).chain(args).collect::<Vec<_>>().join(" ")
}
