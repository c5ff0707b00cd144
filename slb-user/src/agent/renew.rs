//! A backend that fails a check may be another machine at the same address: the link is asked for its MAC address at once.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, watch};
use tracing::debug;

use crate::net::{NextHop, Wire};

/// How often one backend is asked for at most.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// The way to each backend.
pub(super) type Hops = Arc<HashMap<IpAddr, NextHop>>;

/// Asks for the backends whose checks fail, until the agent ends.
pub(super) async fn run(mut failed: mpsc::Receiver<SocketAddr>, hops: watch::Receiver<Hops>) {
    let mut wire = None;
    let mut asked = HashMap::<IpAddr, Instant>::new();
    while let Some(backend) = failed.recv().await {
        let (now, address) = (Instant::now(), backend.ip());
        asked.retain(|_, at| now < *at + ASK_EVERY);
        if asked.contains_key(&address) {
            continue;
        }
        let Some(hop) = hops.borrow().get(&address).cloned() else { continue };
        asked.insert(address, now);
        let opened = match wire.take() {
            Some(wire) => Ok(wire),
            None => Wire::open(),
        };
        match opened.and_then(|opened| wire.insert(opened).ask(&hop)) {
            Ok(is_asked) => debug!(%address, is_asked, "the check failed: its MAC is asked for"),
            Err(error) => debug!(%address, %error, "cannot ask for its MAC"),
        }
    }
}
