//! Writes what the program logs to the agent's log.

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;

/// Starts to; a program whose logs cannot be read balances all the same.
pub fn start(ebpf: &mut Ebpf) {
    let logger = match EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "cannot read the program's log"),
    };
    tokio::spawn(async move {
        // SAFETY: the logger owns the ring buffer's descriptor, and closes it when it is dropped.
        let Ok(mut logger) = (unsafe { AsyncFd::register(logger) }) else { return };
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
}
