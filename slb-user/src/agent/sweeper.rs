//! Looks after the flow table: settles slots, and ends flows whose time is up.

use std::{net::SocketAddr, sync::Arc};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_api::{EventKind, ProblemName};
use slb_common::abi::{Flow, NO_SOURCE};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{
    Agent, SWEEP_SLACK,
    backends::Backends,
    reconciler::{CLOSING, Reconciler},
    watcher::WatchSpec,
};
use crate::{
    clock::Jiffies,
    datapath::{Loaded, SweepReport, SweepRequest},
    ids::Ids,
    net::{ConnectionEnds, send_challenge_acks},
    plan::{Step, retire},
    state::Schedule,
};

/// The table is looked through at least every so many times, although nothing is known to be there.
const AT_LEAST_EVERY: u32 = 12;

/// So many per cent of the flows that the table was made for are a problem, until there are fewer than the second.
const FILLING_BEGINS: u64 = 80;
const FILLING_ENDS: u64 = 70;

/// Has the flow table looked through, in a thread of its own: it is large.
pub(super) struct Sweeper {
    reports: mpsc::Sender<Swept>,
    /// How often the table was to be looked through.
    turns: u32,
    jiffies: Jiffies,
    /// Places of the flow table that hold an entry, as of the last look.
    pub occupied: u64,
    /// The flow table is filling: flows, as of the last look.
    pub filling: Option<u64>,
}

/// What a look through the flow table has found.
pub(super) struct Swept {
    /// The schedules that it was for.
    schedules: FxHashMap<u32, Arc<Schedule>>,
    report: SweepReport,
}

impl Sweeper {
    /// Reports go to `reports`, one at a time.
    pub(super) const fn new(reports: mpsc::Sender<Swept>, jiffies: Jiffies) -> Self {
        Self { reports, turns: 0, jiffies, occupied: 0, filling: None }
    }

    /// Begins a sweep if there is anything to be found, and none is under way.
    fn sweep(&mut self, datapath: &Loaded, backends: &Backends, reconciler: &Reconciler) {
        let schedules = reconciler.watched();
        let leaving = Reconciler::leaving(&datapath.maps, backends);
        let closed = Reconciler::closed(&datapath.maps);
        let permit = self.reports.clone().try_reserve_owned();
        let (Ok(permit), Ok(now)) = (permit, self.jiffies.now()) else { return };
        // A count that is off by one flow may hide it: a look all the same, but not every time.
        self.turns = self.turns.wrapping_add(1);
        let is_asked_for = !schedules.is_empty() || !leaving.is_empty() || !closed.is_empty();
        let is_due = self.turns.is_multiple_of(AT_LEAST_EVERY);
        if !is_asked_for && !is_due && !datapath.table.is_used() {
            return;
        }
        let indexed = backends.ids.listeners.iter();
        let listeners = indexed.clone().flat_map(|it| it.endpoints.iter().copied()).collect();
        let watched = indexed
            .filter_map(|listener| Some((listener, schedules.get(&listener.id)?)))
            .flat_map(|(listener, schedule)| {
                let entry = (listener.id, Arc::clone(schedule));
                listener.endpoints.iter().map(move |&endpoint| (endpoint, entry.clone()))
            })
            .collect();
        let slack = self.jiffies.from_duration(SWEEP_SLACK);
        let now = now.wrapping_sub(slack);
        let closing = slack + self.jiffies.from_duration(CLOSING);
        let request = SweepRequest { watched, leaving, closed, listeners, now, closing };
        let table = datapath.table.clone();
        tokio::task::spawn_blocking(move || {
            let report = table.sweep(request);
            permit.send(Swept { schedules, report });
        });
    }
}

impl Agent {
    /// Does what is done from time to time.
    pub(super) fn sweep(&mut self) {
        let shortage = self.backends.checkers.shortage();
        self.failures.note(ProblemName::ProbesShortOfResources, shortage);
        if self.reconciler.end_closing() {
            self.reconcile();
        }
        self.sweeper.sweep(&self.datapath, &self.backends, &self.reconciler);
    }

    /// Acts on what a sweep has found.
    pub(super) fn settle(&mut self, Swept { schedules, report }: Swept) {
        let SweepReport { pinned, left, ended, occupied } = report;
        self.sweeper.occupied = occupied;
        self.watch_filling();
        for (id, pinned) in pinned {
            self.reconciler.settle(id, &schedules[&id], &pinned);
        }
        self.reconciler.close(&ended);
        self.forget(&left);
        self.reconcile();
        // Now the program knows what to do with the answers.
        self.reset(&ended);
    }

    /// Notes when the flow table begins to fill, and when it no longer does.
    fn watch_filling(&mut self) {
        let flows = self.datapath.table.active_flows();
        let capacity = u64::from(self.datapath.flow_table().0);
        let was_filling = self.sweeper.filling.is_some();
        let limit = if was_filling { FILLING_ENDS } else { FILLING_BEGINS };
        let is_filling = flows * 100 >= capacity * limit;
        self.sweeper.filling = is_filling.then_some(flows);
        if is_filling != was_filling {
            let change = if is_filling { "is filling" } else { "has room again" };
            let text = format!("the flow table {change}: {flows} flows, made for {capacity}");
            info!("{text}");
            self.events.note(EventKind::Flows, text);
        }
    }

    /// Forgets the backends of which no flow is left.
    fn forget(&mut self, left: &FxHashSet<u32>) {
        if self.reloader.is_busy() {
            return;
        }
        // One may have come and gone again since that look.
        let leaving = Reconciler::leaving(&self.datapath.maps, &self.backends);
        let over: Vec<u32> = leaving.intersection(left).copied().collect();
        if over.is_empty() {
            return;
        }
        let mut gone = Vec::new();
        for id in &over {
            let Some(&backend) = self.datapath.maps.installed().backends.get(id) else { continue };
            let position = self.backends.position(*id);
            let address = position.map(|index| self.backends.ids.backends[index].addr);
            gone.push(address.map(|addr| addr.to_string()).unwrap_or_default());
            self.attempt(ProblemName::MapsNotWritten, |agent| {
                agent.datapath.maps.apply(Step::PutBackend(*id, retire(backend))).map(drop)
            });
        }
        // As it has fitted before.
        if let Ok(ids) = Ids::assign(&self.config, self.datapath.maps.installed()) {
            self.reloader.order(WatchSpec::new(&self.config, &ids), None);
            self.adopt(ids);
            self.reconcile();
        }
        for address in gone {
            info!(backend = address, "removed with its last flow");
            let text = format!("{address}, which was removed, has no flow left");
            self.events.note(EventKind::Flows, text);
        }
    }

    /// Whether a backend is drained whose flows have not been ended yet.
    pub(super) fn has_closed_flows(&self) -> bool {
        let closed = Reconciler::closed(&self.datapath.maps);
        closed.into_iter().any(|id| self.datapath.table.active(id) > 0)
    }

    fn reset(&mut self, ended: &[Flow]) {
        if ended.is_empty() {
            return;
        }
        let count = ended.len();
        let installed = self.datapath.maps.installed();
        let connections: Vec<ConnectionEnds> = ended
            .iter()
            .filter_map(|flow| {
                let backend = installed.backends.get(&flow.backend)?;
                let source = installed.sources.get(&flow.source.into()).copied();
                let source = source.filter(|_| flow.source != NO_SOURCE).map(Into::into);
                let is_direct = backend.mode.is_direct();
                let addr = SocketAddr::new(backend.addr.into(), backend.port as u16);
                Some(ConnectionEnds::new(flow, addr, source, is_direct))
            })
            .collect();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = send_challenge_acks(&connections) {
                warn!(%error, "cannot reset the ended connections at once; their next packet will");
            }
        });
        let text =
            format!("{count} connections were idle for too long, or their backend drained: reset");
        self.events.note(EventKind::Flows, text);
        info!(connections = count, "reset connections that were idle or drained");
    }
}
