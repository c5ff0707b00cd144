//! Kills a process at its n-th call that changes something outside of it, by ptrace(2).

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use slb_lab::Netns;

/// Commands of bpf(2) that change a map, a pin or a link: `enum bpf_cmd` of the kernel's `linux/bpf.h`.
const BPF: [(u64, &str); 8] = [
    (2, "BPF_MAP_UPDATE_ELEM"),
    (3, "BPF_MAP_DELETE_ELEM"),
    (6, "BPF_OBJ_PIN"),
    (21, "BPF_MAP_LOOKUP_AND_DELETE_ELEM"),
    (26, "BPF_MAP_UPDATE_BATCH"),
    (28, "BPF_LINK_CREATE"),
    (29, "BPF_LINK_UPDATE"),
    (34, "BPF_LINK_DETACH"),
];
/// Other calls that change something.
const OTHERS: [(i64, &str); 8] = [
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_rmdir, "rmdir"),
    (libc::SYS_mount, "mount"),
];

/// A process whose calls are counted.
pub(crate) struct Tracee {
    left: Arc<AtomicU64>,
    pid: Pid,
    tracer: JoinHandle<Option<&'static str>>,
}

impl Tracee {
    /// Starts `command` in `netns`; it is killed at the `at`-th call from now on, before the kernel carries that out.
    pub(crate) fn start(netns: &Arc<Netns>, mut command: Command, at: u64) -> Self {
        let left = Arc::new(AtomicU64::new(at));
        let (counter, netns) = (Arc::clone(&left), Arc::clone(netns));
        let (tell, told) = std::sync::mpsc::channel();
        // ptrace(2): only the thread that traces a process may ask for anything.
        let tracer = thread::spawn(move || {
            // SAFETY: the closure makes one system call.
            unsafe { command.pre_exec(|| Ok(ptrace::traceme()?)) };
            let mut child = netns.spawn(&mut command).unwrap();
            let pid = Pid::from_raw(child.id().try_into().unwrap());
            tell.send(pid).unwrap();
            follow(&mut child, pid, &counter)
        });
        Self { left, pid: told.recv().unwrap(), tracer }
    }

    /// As of now, it is killed at the `at`-th call.
    pub(crate) fn kill_at(&self, at: u64) {
        self.left.store(at, Ordering::SeqCst);
    }

    /// Whether it has ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.tracer.is_finished()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // It may have ended by now.
        let _ = kill(self.pid, signal);
    }

    /// Waits for its end; the call that it was killed at, if it was.
    pub(crate) fn ended(self) -> Option<&'static str> {
        self.tracer.join().unwrap()
    }
}

/// Lets the process go on from stop to stop until it has ended.
fn follow(child: &mut Child, pid: Pid, left: &AtomicU64) -> Option<&'static str> {
    let mut killed = None;
    let stopped = waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
    assert_eq!(
        stopped,
        WaitStatus::Stopped(pid, Signal::SIGTRAP),
        "it stops when its program begins"
    );
    let options =
        Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).unwrap();
    let mut go_on = (pid, None);
    loop {
        // A thread that was killed meanwhile cannot go on.
        let _ = ptrace::syscall(go_on.0, go_on.1);
        // Of this thread's children only: the test has others.
        let any = Pid::from_raw(-1);
        go_on = match waitpid(any, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
            Ok(WaitStatus::PtraceSyscall(thread)) => {
                if let Some(call) = changing_call(thread)
                    && left.fetch_sub(1, Ordering::SeqCst) == 1
                {
                    killed = Some(call);
                    kill(pid, Signal::SIGKILL).unwrap();
                }
                (thread, None)
            }
            // A new thread begins stopped.
            Ok(WaitStatus::Stopped(thread, Signal::SIGSTOP)) => (thread, None),
            Ok(WaitStatus::Stopped(thread, signal)) => (thread, Some(signal)),
            Ok(WaitStatus::PtraceEvent(thread, ..)) => (thread, None),
            Ok(WaitStatus::Exited(process, _) | WaitStatus::Signaled(process, ..))
                if process == pid =>
            {
                break;
            }
            Ok(_) => continue,
            Err(Errno::ECHILD) => break,
            Err(error) => panic!("waiting for the traced process: {error}"),
        };
    }
    // It was waited for already.
    let _ = child.try_wait();
    killed
}

/// The call at whose beginning a thread has stopped, if it changes something.
fn changing_call(thread: Pid) -> Option<&'static str> {
    let info = ptrace::syscall_info(thread).ok()?;
    if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    // SAFETY: `op` says that this member is the one in use.
    let entry = unsafe { info.u.entry };
    let [command, ..] = entry.args;
    let number = i64::try_from(entry.nr).ok()?;
    match number {
        libc::SYS_bpf => BPF.iter().find(|(known, _)| *known == command).map(|(_, name)| *name),
        libc::SYS_sendto => changes_network(thread, entry.args).then_some("netlink"),
        _ => OTHERS.iter().find(|(known, _)| *known == number).map(|(_, name)| *name),
    }
}

/// Whether sendto(2) sends a request to add, remove or set something by netlink: `struct nlmsghdr`, whose types come in
/// groups of new, del, get and set (linux/rtnetlink.h).
fn changes_network(thread: Pid, [_, buffer, length, ..]: [u64; 6]) -> bool {
    const FIRST: u64 = 16;
    const GET: u64 = 2;
    let Ok(word) = ptrace::read(thread, buffer as ptrace::AddressType) else { return false };
    let word = word as u64;
    let (size, kind) = (word & 0xffff_ffff, (word >> 32) & 0xffff);
    (16..=length).contains(&size) && (FIRST..128).contains(&kind) && kind % 4 != GET
}
