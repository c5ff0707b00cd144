//! Work for one request: a panic in it, which is a defect, costs the request and not the agent.

use std::future::Future;

tokio::task_local! {
    static CONTAINED: ();
}

/// Whether this thread is doing work that may panic.
pub(crate) fn is_contained() -> bool {
    CONTAINED.try_with(|()| ()).is_ok()
}

/// A task of its own may panic: the runtime catches it.
pub(crate) fn task<F: Future>(work: F) -> impl Future<Output = F::Output> {
    CONTAINED.scope((), work)
}

/// What [`tokio::task::spawn_blocking`] runs may panic: its handle has the error.
pub(crate) fn blocking<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    || CONTAINED.sync_scope((), work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_contained_work_is_contained() {
        assert!(!is_contained());
        assert!(task(async { is_contained() }).await);
        assert!(tokio::task::spawn_blocking(blocking(is_contained)).await.unwrap());
        assert!(!tokio::task::spawn_blocking(is_contained).await.unwrap());
    }
}
