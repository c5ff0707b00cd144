//! Work on the configuration file, in a thread of its own and with a time limit: a disk may hang, and a named pipe has
//! an end only when its writer says so.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, oneshot},
    time::{Instant, timeout_at},
};

use super::{atomic_write::AtomicWrite, config_cache::Parsed};
use crate::{api::Refusal, contained};

/// A command waits for ten seconds, and is to hear why.
pub(super) const WITHIN: Duration = Duration::from_secs(8);
/// So many threads may hang before no further one is tried.
const HANGING: usize = 4;

/// What has become of the work.
pub(super) enum Outcome {
    /// The file was read, and another text written beside it if that was asked for.
    Read(Box<Result<(Parsed, Option<AtomicWrite>), Refusal>>),
    /// The file was replaced.
    Replaced(io::Result<()>),
    /// It takes too long. What it still reads is of no use; a file that is not replaced yet will not be.
    Late,
    /// It has panicked.
    Broken,
}

/// Starts jobs.
#[derive(Debug)]
pub(super) struct FileJobs(Arc<Semaphore>);

/// One that runs. Dropping it gives it up.
pub(super) struct FileJob {
    outcome: oneshot::Receiver<Outcome>,
    until: Instant,
    wanted: Arc<AtomicBool>,
}

/// Whether the agent still waits for a job.
#[derive(Clone, Debug)]
pub(super) struct Wanted(Arc<AtomicBool>);

#[cfg(test)]
impl Default for Wanted {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Wanted {
    pub fn holds(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Default for FileJobs {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(HANGING)))
    }
}

impl FileJobs {
    /// Runs `work` unless too many hang already.
    pub fn start(&self, work: impl FnOnce(Wanted) -> Outcome + Send + 'static) -> Option<FileJob> {
        let permit = Arc::clone(&self.0).try_acquire_owned().ok()?;
        let (done, outcome) = oneshot::channel();
        let wanted = Arc::new(AtomicBool::new(true));
        let is_wanted = Wanted(Arc::clone(&wanted));
        tokio::task::spawn_blocking(contained::blocking(move || {
            // The result of a job that was given up is dropped here, and its temporary file with it.
            let _ = done.send(work(is_wanted));
            drop(permit);
        }));
        Some(FileJob { outcome, until: Instant::now() + WITHIN, wanted })
    }
}

impl FileJob {
    /// Waits for its end. Cancel-safe.
    pub async fn ended(&mut self) -> Outcome {
        match timeout_at(self.until, &mut self.outcome).await {
            Ok(outcome) => outcome.unwrap_or(Outcome::Broken),
            Err(_) => Outcome::Late,
        }
    }
}

impl Drop for FileJob {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A job that hangs until the sender is dropped, and then tells whether it is wanted.
    fn hanging(jobs: &FileJobs) -> Option<(FileJob, mpsc::Sender<()>, mpsc::Receiver<bool>)> {
        let (go_on, goes_on) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let job = jobs.start(move |wanted| {
            let _ = goes_on.recv();
            let _ = tell.send(wanted.holds());
            Outcome::Replaced(Ok(()))
        })?;
        Some((job, go_on, told))
    }

    #[tokio::test]
    async fn hanging_job_is_late_and_then_not_wanted() {
        let jobs = FileJobs::default();
        let (mut job, go_on, told) = hanging(&jobs).unwrap();
        job.until = Instant::now();
        assert!(matches!(job.ended().await, Outcome::Late));
        drop(job);
        drop(go_on);
        assert!(!told.recv().unwrap());
    }

    #[tokio::test]
    async fn too_many_hanging_jobs_are_refused_until_one_ends() {
        let jobs = FileJobs::default();
        let mut hang: Vec<_> = (0..HANGING).map(|_| hanging(&jobs).unwrap()).collect();
        assert!(hanging(&jobs).is_none());
        let (mut job, go_on, told) = hang.pop().unwrap();
        drop(go_on);
        assert!(told.recv().unwrap());
        assert!(matches!(job.ended().await, Outcome::Replaced(Ok(()))));
        while jobs.0.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        assert!(hanging(&jobs).is_some());
    }

    #[tokio::test]
    async fn panicking_job_is_broken() {
        let mut job = FileJobs::default().start(|_| panic!("a defect")).unwrap();
        assert!(matches!(job.ended().await, Outcome::Broken));
    }
}
