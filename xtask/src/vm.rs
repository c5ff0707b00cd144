//! Other kernels, in virtual machines: Debian's own, with programs of this machine in its memory.
//!
//! The processor is emulated, never borrowed from the host: the same everywhere, and there is no need
//! for nested virtualisation.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::{prctl::set_pdeathsig, signal::Signal};

use crate::process;
use image::Image;
pub(crate) use kernel::{KERNELS, Kernel};

mod image;
mod kernel;

pub(crate) const QEMU: &str = "qemu-system-x86_64";
pub(crate) const BUSYBOX: &str = "busybox";

/// What the machine may take for everything. It is done in a quarter of that, on two processors.
const LIMIT: Duration = Duration::from_secs(1_800);
/// Where the machine has busybox.
const SHELL: &str = "/bin/busybox";
/// Where the machine has all programs but busybox.
const PROGRAMS: &str = "/slb/bin";
/// No other program prints this at the beginning of a line.
const MARK: &str = "slb-vm:";

/// A command in the machine.
pub(crate) struct Step {
    /// What it is called in the machine; one word.
    pub name: &'static str,
    /// The program, as it is here; its libraries come along.
    pub program: PathBuf,
    /// What it is started with.
    pub args: Vec<&'static str>,
}

/// What to boot.
pub(crate) struct Machine {
    /// In their order, until one fails.
    pub steps: Vec<Step>,
    /// Programs of this system that the steps start.
    pub programs: Vec<&'static str>,
    /// Other files: where they are, and where they are to be in the machine.
    pub files: Vec<(PathBuf, &'static str)>,
    /// For all steps.
    pub environment: Vec<(&'static str, String)>,
    /// Modules to load, by name.
    pub modules: Vec<&'static str>,
}

impl Machine {
    /// Boots a kernel and gives every line that the steps printed.
    ///
    /// # Errors
    ///
    /// A step fails, the machine dies or is not done in time.
    pub(crate) fn run(&self, kernel: &Kernel) -> Result<Vec<String>> {
        let folder =
            tempfile::tempdir_in(process::target()?).context("making a temporary directory")?;
        let initramfs = folder.path().join("initramfs");
        self.image(kernel)?.write(&initramfs)?;
        println!("\nBooting {}", kernel.name());
        let began = Instant::now();
        let lines = boot(kernel.vmlinuz(), &initramfs)?;
        self.judge(&lines)?;
        println!("{} did all of it in {} s", kernel.name(), began.elapsed().as_secs());
        Ok(lines)
    }

    fn image(&self, kernel: &Kernel) -> Result<Image> {
        let mut image = Image::default();
        image.add_program(&find(BUSYBOX)?, Path::new(SHELL))?;
        for name in &self.programs {
            image.add_program(&find(name)?, &Path::new(PROGRAMS).join(name))?;
        }
        for step in &self.steps {
            image.add_program(&step.program, &Path::new(PROGRAMS).join(step.name))?;
        }
        for (from, to) in &self.files {
            image.add_file(from, Path::new(to))?;
        }
        let mut modules = Vec::new();
        for (number, module) in kernel.modules(&self.modules)?.iter().enumerate() {
            let to = format!("/slb/modules/{number}.ko");
            image.add_file(module, Path::new(&to))?;
            modules.push(to);
        }
        image.add_script(Path::new("/init"), self.init(&modules, &image.library_path()));
        Ok(image)
    }

    /// The first process; when it ends, so does the machine.
    fn init(&self, modules: &[String], libraries: &str) -> String {
        let mut lines = vec![
            format!("#!{SHELL} sh"),
            format!("b={SHELL}"),
            "$b mkdir -p /proc /sys /dev /run /tmp /var".to_owned(),
            "$b ln -s /run /var/run".to_owned(),
        ];
        let mounts = [
            ("proc", "/proc"),
            ("sysfs", "/sys"),
            ("devtmpfs", "/dev"),
            ("bpf", "/sys/fs/bpf"),
            ("tmpfs", "/run"),
        ];
        lines.extend(mounts.map(|(kind, at)| format!("$b mount -t {kind} {kind} {at}")));
        lines.extend(modules.iter().map(|module| format!("$b insmod {module}")));
        lines.push(format!("export PATH={PROGRAMS} LD_LIBRARY_PATH={libraries}"));
        lines.extend(self.environment.iter().map(|(name, value)| format!("export {name}={value}")));
        for Step { name, args, .. } in &self.steps {
            lines.push(format!("{name} {}", args.join(" ")));
            lines.push("code=$?".to_owned());
            lines.push(format!("echo {MARK} {name} $code"));
            lines.push("[ $code = 0 ] || $b poweroff -f".to_owned());
        }
        lines.push("$b poweroff -f\n".to_owned());
        lines.join("\n")
    }

    /// Whether all steps have said that they are done, and well.
    fn judge(&self, lines: &[String]) -> Result<()> {
        for Step { name, .. } in &self.steps {
            let end = format!("{MARK} {name} ");
            match lines.iter().find_map(|line| line.strip_prefix(&end)) {
                Some("0") => {}
                Some(code) => bail!("{name}: exit code {code} in the virtual machine"),
                None => bail!("the virtual machine ended before {name} did"),
            }
        }
        Ok(())
    }
}

fn find(program: &str) -> Result<PathBuf> {
    process::find(program).with_context(|| format!("no {program}"))
}

/// Kills the emulator when the caller leaves early; when this whole program does, the kernel kills it.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        // Fails if it has ended, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot(vmlinuz: &Path, initramfs: &Path) -> Result<Vec<String>> {
    let mut command = Command::new(QEMU);
    command
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-serial", "stdio"])
        // A panic reboots at once, which ends the emulator.
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .arg("-kernel")
        .arg(vmlinuz)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    println!("$ {}", process::text(&command));
    // SAFETY: a single system call.
    unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    let mut emulator = Emulator(command.spawn().context(QEMU)?);
    let console = emulator.0.stdout.take().context("the console is piped")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let began = Instant::now();
    let deadline = began + LIMIT;
    let mut lines = Vec::new();
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("{:4} s | {line}", began.elapsed().as_secs());
                lines.push(line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => bail!("the virtual machine is not done in {LIMIT:?}"),
        }
    }
    let status = emulator.0.wait().context(QEMU)?;
    if !status.success() {
        bail!("{QEMU}: {status}");
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(lines: &[&str]) -> Result<()> {
        let step = |name| Step { name, program: PathBuf::from("/bin/x"), args: vec![] };
        let machine = Machine {
            steps: vec![step("first"), step("second")],
            programs: vec![],
            files: vec![],
            environment: vec![],
            modules: vec![],
        };
        machine.judge(&lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn given_a_console_when_it_is_judged_then_every_step_must_have_ended_well() {
        assert!(judge(&["noise", "slb-vm: first 0", "slb-vm: second 0"]).is_ok());
        for lines in [
            &["slb-vm: first 0"][..],
            &["slb-vm: first 0", "Kernel panic - not syncing"],
            &["slb-vm: first 101", "slb-vm: second 0"],
            &["slb-vm: first 0", "slb-vm: second 1"],
            &[],
        ] {
            assert!(judge(lines).is_err(), "{lines:?}");
        }
    }
}
