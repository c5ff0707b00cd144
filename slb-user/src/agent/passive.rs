//! Passive checks, in a task of their own: it reads the counters of all backends that are watched in a few system calls,
//! and tells the agent's loop only of those that clients cannot connect to, to have them probed at once.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};
use tracing::{debug, warn};

use super::Agent;
use crate::{
    datapath::{Counters, TableError},
    health::{Health, PassiveCheck},
    observe::Snapshot,
};

/// How often the counters are read.
const PERIOD: Duration = Duration::from_millis(100);

/// A backend that clients seem unable to connect to.
#[derive(Debug)]
pub(super) struct Suspect {
    /// Its [`crate::ids::IndexedBackend::id`].
    id: u32,
    addr: SocketAddr,
    reason: String,
}

/// The state of all passive checks.
#[derive(Debug)]
pub(super) struct PassiveChecks {
    counters: Arc<Counters>,
    /// By index into `SLB_BACKENDS` and address: an index may be another backend's later.
    checks: HashMap<(u32, SocketAddr), PassiveCheck>,
}

impl PassiveChecks {
    pub(super) fn new(counters: Arc<Counters>) -> Self {
        Self { counters, checks: HashMap::new() }
    }

    /// Checks the backends of the latest snapshot until the agent ends; suspects go to `agent`.
    pub(super) async fn run(
        mut self,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
        agent: mpsc::Sender<Vec<Suspect>>,
    ) {
        let mut turns = tokio::time::interval(PERIOD);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_readable = true;
        loop {
            // Not a turn for nothing where no backend is checked in this way.
            let found = snapshots.wait_for(|snapshot| watched(snapshot).next().is_some()).await;
            let Ok(snapshot) = found.map(|snapshot| Arc::clone(&snapshot)) else { return };
            turns.tick().await;
            let looked = tokio::task::spawn_blocking(move || {
                let found = self.look(&snapshot, Instant::now());
                (self, found)
            });
            let Ok((checks, found)) = looked.await else { return };
            self = checks;
            match found {
                Ok(suspects) if suspects.is_empty() => is_readable = true,
                Ok(suspects) => {
                    is_readable = true;
                    if agent.send(suspects).await.is_err() {
                        return;
                    }
                }
                Err(error) if is_readable => {
                    is_readable = false;
                    warn!(%error, "cannot read what clients see of backends; trying again");
                }
                Err(_) => {}
            }
        }
    }

    /// Reads the counters again. Gives the backends that are found out.
    fn look(&mut self, snapshot: &Snapshot, now: Instant) -> Result<Vec<Suspect>, TableError> {
        let ids = watched(snapshot).map(|(id, _)| id);
        let (first, end) =
            ids.fold((u32::MAX, 0), |(first, end), id| (first.min(id), end.max(id + 1)));
        let answers = self.counters.answers(first..end)?;
        let traffic = self.counters.traffic(first..end)?;
        let mut before = std::mem::take(&mut self.checks);
        let mut suspects = Vec::new();
        for (id, addr) in watched(snapshot) {
            let at = (id - first) as usize;
            let (Some(answers), Some(traffic)) = (answers.get(at), traffic.get(at)) else {
                continue;
            };
            let (accepted, refused, flows) = (answers.accepted, answers.refused, traffic.flows);
            let key = (id, addr);
            let mut check =
                before.remove(&key).unwrap_or(PassiveCheck::new(accepted, refused, flows));
            if let Some(reason) = check.look(accepted, refused, flows, now) {
                suspects.push(Suspect { id, addr, reason });
            }
            self.checks.insert(key, check);
        }
        Ok(suspects)
    }
}

/// The backends that are checked in this way: those that get new flows, for others no client can try.
fn watched(snapshot: &Snapshot) -> impl Iterator<Item = (u32, SocketAddr)> {
    let backends = snapshot.ids.backends.iter().zip(snapshot.health.iter());
    backends
        .filter(|(backend, health)| {
            let is_passive = backend.check.as_ref().is_some_and(|(check, _)| check.passive);
            is_passive && **health != Health::Unhealthy
        })
        .map(|(backend, _)| (backend.id, backend.addr))
}

impl Agent {
    /// Has the backends probed that clients cannot connect to. Nothing is decided here: anybody can send packets that
    /// look like a backend that fails.
    pub(super) fn suspect(&self, suspects: Vec<Suspect>) {
        for Suspect { id, addr, reason } in suspects {
            let Some(index) = self.backends.position(id) else { continue };
            // The configuration may be another one by now.
            let backend = &self.backends.ids.backends[index];
            let is_same = backend.addr == addr
                && backend.check.as_ref().is_some_and(|(check, _)| check.passive);
            if is_same {
                debug!(%addr, reason, "backend is probed early");
                self.backends.checkers.suspect(&id, reason);
            }
        }
    }
}
