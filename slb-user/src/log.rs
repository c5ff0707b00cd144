//! The log of `slb run`: lines to stderr, without waiting for their reader.
//!
//! A thread of its own writes. While it waits for the reader, lines queue up; when the queue is full they are dropped
//! and counted, as are lines that cannot be written. Nothing else in `slb run` may write to stdout or stderr: one write
//! to a pipe that is not read would stop it.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    borrow::Cow,
    io::{self, IsTerminal as _, Write},
    panic::PanicHookInfo,
    process,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tracing::{error, warn};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use crate::{
    contained,
    printable::{PrintableLines, is_plain},
};

/// Lines that may wait for the reader.
const QUEUE: usize = 1_024;
/// A line is cut off here, so that the queue has a bound in bytes as well: the report about a wrong file may be long.
const LONGEST: usize = 16 * 1024;
/// How long the process waits at its end for the lines that are left to be read. [`WorkerGuard`] has a bound of its
/// own, but prints to stdout when it is exceeded.
const FLUSH: Duration = Duration::from_secs(2);
/// The exit code that Rust gives a process that has panicked.
const PANICKED: i32 = 101;

/// Lines that found the queue full.
static QUEUE_FULL: OnceLock<ErrorCounter> = OnceLock::new();
/// Lines whose write has failed.
static FAILED: AtomicU64 = AtomicU64::new(0);
/// Ends the thread that writes.
static WRITER: Mutex<Option<WorkerGuard>> = Mutex::new(None);

/// How many lines this process has dropped.
#[must_use]
pub fn dropped_lines() -> u64 {
    let queue_full = QUEUE_FULL.get().map_or(0, ErrorCounter::dropped_lines);
    FAILED.load(Ordering::Relaxed) + queue_full as u64
}

/// The log of this process.
#[derive(Clone, Debug)]
pub struct Log(NonBlocking);

impl Log {
    /// Starts the thread that writes. Once per process.
    ///
    /// # Panics
    ///
    /// No thread can be had.
    #[must_use]
    pub fn start() -> Self {
        let (queue, writer) = NonBlockingBuilder::default()
            .buffered_lines_limit(QUEUE)
            .lossy(true)
            .thread_name("log")
            .finish(Stderr { reported: 0 });
        QUEUE_FULL.get_or_init(|| queue.error_counter());
        *WRITER.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        Self(queue)
    }

    /// Has events and panics go here.
    pub fn install(&self, filter: EnvFilter) {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(self.clone())
            .with_ansi(io::stderr().is_terminal())
            // They would be printed to stderr.
            .log_internal_errors(false)
            .init();
        std::panic::set_hook(Box::new(panicked));
    }

    /// Writes a text: what a command would print to stderr.
    pub fn print(&self, text: &str) {
        // The queue takes it, or counts it.
        let _ = self.clone().write_all(format!("{}\n", PrintableLines(text)).as_bytes());
    }
}

/// Waits until the queued lines are written, but not for long. Later ones are lost.
pub fn flush() {
    let Some(writer) = WRITER.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    let (done, is_done) = mpsc::channel();
    let thread = thread::Builder::new().spawn(move || {
        drop(writer);
        // The process may be past waiting.
        let _ = done.send(());
    });
    if thread.is_ok() {
        let _ = is_done.recv_timeout(FLUSH);
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let plain = plain(line);
        match cut(&plain) {
            None => self.0.write(&plain),
            Some(cut) => self.0.write(cut.as_bytes()),
        }
        .map(|_| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// A line without what is not plain text, but for the colours that [`tracing_subscriber`] puts around it: that escapes
/// those in messages itself.
fn plain(line: &[u8]) -> Cow<'_, [u8]> {
    const COLOUR: char = '\u{1b}';
    let is_kept = |c| is_plain(c) || matches!(c, '\n' | '\t' | COLOUR);
    match str::from_utf8(line) {
        Ok(text) if text.chars().all(is_kept) => line.into(),
        _ => {
            let text = String::from_utf8_lossy(line);
            let parts = text.split(COLOUR).map(|part| PrintableLines(part).to_string());
            parts.collect::<Vec<_>>().join("\u{1b}").into_bytes().into()
        }
    }
}

/// The beginning of a line that is too long.
fn cut(line: &[u8]) -> Option<String> {
    let more = line.len().checked_sub(LONGEST).filter(|more| *more > 0)?;
    let begin = String::from_utf8_lossy(&line[..LONGEST]);
    Some(format!("{begin}… ({more} more bytes)\n"))
}

/// What the thread writes to. It never fails: a line that cannot be written is counted.
struct Stderr {
    /// How many dropped lines the log has been told of.
    reported: u64,
}

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if io::stderr().write_all(line).is_err() {
            FAILED.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        }
        let dropped = dropped_lines();
        if dropped > self.reported {
            self.reported = dropped;
            report(dropped);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes past the queue, which may be full still.
fn report(dropped: u64) {
    let direct = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .log_internal_errors(false)
        .finish();
    tracing::subscriber::with_default(direct, || {
        warn!(dropped, "log lines were dropped: stderr was full, or not read fast enough");
    });
}

/// Logs a panic, and ends the process: without the task that has panicked the agent would look alive and not do its
/// work. The next agent takes over within seconds, and the datapath goes on meanwhile.
fn panicked(panic: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => String::new(),
    };
    let message = panic.payload_as_str().unwrap_or("(no message)");
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    if contained::is_contained() {
        error!(place, "a request ended in a panic, which is a defect of slb: {message}{backtrace}");
        return;
    }
    error!(place, "the agent ends in a panic, which is a defect of slb: {message}{backtrace}");
    flush();
    process::exit(PANICKED);
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread::sleep};

    use super::*;

    /// In its environment a test is the process that the others look at.
    const CHILD: &str = "SLB_TEST_PANICS";

    /// Exit code and stderr of a process in which a task has panicked.
    fn panicking(how: &str) -> (Option<i32>, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "log::tests::child", "--ignored", "--nocapture"]);
        let output = command.env(CHILD, how).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    #[test]
    #[ignore = "the other tests run it"]
    fn child() {
        let Ok(how) = std::env::var(CHILD) else { return };
        Log::start().install(EnvFilter::new("info"));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let task = async { panic!("a defect") };
        if how == "contained" {
            assert!(runtime.block_on(runtime.spawn(contained::task(task))).is_err());
            flush();
            process::exit(0);
        }
        runtime.spawn(task);
        // Far longer than a panic takes to end the process.
        sleep(Duration::from_secs(60));
    }

    #[test]
    fn panic_in_a_task_is_logged_and_ends_the_process() {
        let (code, said) = panicking("task");
        assert_eq!(code, Some(PANICKED), "{said}");
        assert!(said.contains("the agent ends in a panic") && said.contains("a defect"), "{said}");
        assert!(said.contains("src/log.rs:"), "{said}");
    }

    #[test]
    fn panic_in_contained_work_is_logged_and_the_process_goes_on() {
        let (code, said) = panicking("contained");
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("a request ended in a panic"), "{said}");
    }

    #[test]
    fn line_is_plain_text_but_for_its_colours() {
        let plain = |line: &'static str| String::from_utf8(plain(line.as_bytes()).into()).unwrap();
        assert_eq!(plain("\u{1b}[33mWARN\u{1b}[0m a\n"), "\u{1b}[33mWARN\u{1b}[0m a\n");
        assert_eq!(plain("\u{1b}[33mWARN a\u{202e}b\rc\n"), "\u{1b}[33mWARN a\\u{202e}b\\rc\n");
        assert_eq!(plain("\u{9b}2J\u{7}"), "\\u{9b}2J\\u{7}");
    }

    #[test]
    fn long_line_is_cut_at_the_bound() {
        assert_eq!(cut(b"short\n"), None);
        assert_eq!(cut(&[b'x'; LONGEST]), None);
        let long = cut(&vec![b'x'; LONGEST + 7]).unwrap();
        assert!(long.ends_with("xx… (7 more bytes)\n"), "{long}");
        assert!(long.len() < LONGEST + 32);
        // In the middle of a character.
        assert!(cut("ä".repeat(LONGEST).as_bytes()).is_some());
    }
}
