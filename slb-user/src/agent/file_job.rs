//! Work on the source of the configuration, in a thread of its own and with a time limit: a disk may hang, and a named
//! pipe ends only when its writer closes it.

use std::{
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

use crate::contained;

/// A command waits for ten seconds, and is to hear why.
pub(super) const WITHIN: Duration = Duration::from_secs(8);
/// So many threads may hang before no further one is tried.
const HANGING: usize = 4;

/// A job has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobFailure {
    /// It takes too long. What it still reads is of no use; a file that is not replaced yet will not be.
    Late,
    /// It has panicked.
    Panicked,
}

/// Starts jobs.
#[derive(Debug)]
pub(super) struct FileJobs(Arc<Semaphore>);

/// A running job. Dropping it gives it up.
pub(super) struct FileJob<T> {
    outcome: oneshot::Receiver<T>,
    until: Instant,
    wanted: Arc<AtomicBool>,
}

/// Whether the agent still waits for a job.
#[derive(Clone, Debug)]
pub(super) struct Wanted(Arc<AtomicBool>);

impl Wanted {
    pub(super) fn holds(&self) -> bool {
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
    pub(super) fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce(Wanted) -> T + Send + 'static,
    ) -> Option<FileJob<T>> {
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

impl<T> FileJob<T> {
    /// Waits for its end. Cancel-safe.
    pub(super) async fn ended(&mut self) -> Result<T, JobFailure> {
        match timeout_at(self.until, &mut self.outcome).await {
            Ok(outcome) => outcome.map_err(|_| JobFailure::Panicked),
            Err(_) => Err(JobFailure::Late),
        }
    }
}

impl<T> Drop for FileJob<T> {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A job that hangs until the sender is dropped, and then tells whether it is wanted.
    fn hanging(jobs: &FileJobs) -> Option<(FileJob<()>, mpsc::Sender<()>, mpsc::Receiver<bool>)> {
        let (go_on, goes_on) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let job = jobs.start(move |wanted| {
            let _ = goes_on.recv();
            let _ = tell.send(wanted.holds());
        })?;
        Some((job, go_on, told))
    }

    #[tokio::test]
    async fn hanging_job_is_late_and_then_not_wanted() {
        let jobs = FileJobs::default();
        let (mut job, go_on, told) = hanging(&jobs).unwrap();
        job.until = Instant::now();
        assert_eq!(job.ended().await, Err(JobFailure::Late));
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
        assert_eq!(job.ended().await, Ok(()));
        while jobs.0.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        assert!(hanging(&jobs).is_some());
    }

    #[tokio::test]
    async fn panicking_job_is_broken() {
        let mut job = FileJobs::default().start(|_| -> () { panic!("a defect") }).unwrap();
        assert_eq!(job.ended().await, Err(JobFailure::Panicked));
    }
}
