//! Looks after the flow table: settles slots, and ends flows whose time is up.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use slb_api::{EventKind, ProblemName};
use slb_common::abi::{
    BACKEND_CLOSED, BACKEND_IN_USE, Flow, MODE_DSR, MODE_GUE, MODE_IPIP, NO_SOURCE,
};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{Agent, SWEEP_SLACK};
use crate::{
    datapath::{Errand, Found},
    net::{Connection, provoke},
    state::Schedule,
};

/// For how long the packets of a connection that was ended are answered with resets.
const CLOSING: Duration = Duration::from_secs(5);

/// Of so many looks one is taken although nothing is known to be there.
const UNASKED: u32 = 12;

/// What a look through the flow table has found.
pub(super) struct Swept {
    /// The schedules that it was for.
    schedules: HashMap<u32, Arc<Schedule>>,
    found: Found,
}

impl Agent {
    /// Looks through the flow table if there is anything to be found, in a thread of its own: it is large.
    pub(super) fn sweep(&mut self, swept: &mpsc::Sender<Swept>) {
        self.failures.note(ProblemName::ProbesShortOfResources, self.checkers.shortage());
        let now = Instant::now();
        let known = self.closing.len();
        self.closing.retain(|_, until| *until > now);
        if self.closing.len() != known {
            self.reconcile();
        }
        let schedules = self.planner.watched();
        let leaving = self.leaving();
        let closed = self.closed();
        let (Ok(permit), Ok(now)) = (swept.clone().try_reserve_owned(), self.jiffies.now()) else {
            return;
        };
        // A count that is off by one flow may hide it: a look all the same, but not every time.
        self.sweeps = self.sweeps.wrapping_add(1);
        let is_asked_for = !schedules.is_empty() || !leaving.is_empty() || !closed.is_empty();
        let is_due = self.sweeps.is_multiple_of(UNASKED);
        if !is_asked_for && !is_due && !self.datapath.table.is_used() {
            return;
        }
        let listeners =
            self.layout.services.iter().flat_map(|it| it.endpoints.iter().copied()).collect();
        let services = self.layout.services.iter();
        let watched = services
            .filter_map(|service| Some((service, schedules.get(&service.id)?)))
            .flat_map(|(service, schedule)| {
                let entry = (service.id, Arc::clone(schedule));
                service.endpoints.iter().map(move |&endpoint| (endpoint, entry.clone()))
            })
            .collect();
        let slack = self.jiffies.from_duration(SWEEP_SLACK);
        let now = now.wrapping_sub(slack);
        let closing = slack + self.jiffies.from_duration(CLOSING);
        let errand = Errand { watched, leaving, closed, listeners, now, closing };
        let table = self.datapath.table.clone();
        tokio::task::spawn_blocking(move || {
            let found = table.sweep(errand);
            permit.send(Swept { schedules, found });
        });
    }

    pub(super) fn settle(&mut self, Swept { schedules, found }: Swept) {
        let Found { pinned, left, ended } = found;
        for (id, pinned) in pinned {
            self.planner.settle(id, &schedules[&id], &pinned);
        }
        let until = Instant::now() + CLOSING;
        self.closing.extend(ended.iter().map(|flow| (flow.backend, until)));
        self.forget(&left);
        self.reconcile();
        // Now the program knows what to do with the answers.
        self.reset(&ended);
    }

    /// Backends that are drained, and whose time is up.
    pub(super) fn closed(&self) -> HashSet<u32> {
        const CLOSED: u32 = BACKEND_CLOSED | BACKEND_IN_USE;
        let backends = self.datapath.maps.installed().backends.iter();
        backends
            .filter(|(_, backend)| backend.flags & CLOSED == CLOSED)
            .map(|(&id, _)| id)
            .collect()
    }

    /// Whether a backend is drained whose flows have not been ended yet.
    pub(super) fn has_closed_flows(&self) -> bool {
        self.closed().into_iter().any(|id| self.datapath.table.active(id) > 0)
    }

    fn reset(&mut self, ended: &[Flow]) {
        if ended.is_empty() {
            return;
        }
        let count = ended.len();
        let installed = self.datapath.maps.installed();
        let connections: Vec<Connection> = ended
            .iter()
            .filter_map(|flow| {
                let backend = installed.backends.get(&flow.backend)?;
                let source = installed.sources.get(&flow.source.into()).copied();
                let source = source.filter(|_| flow.source != NO_SOURCE).map(Into::into);
                let is_direct = matches!(backend.mode, MODE_DSR | MODE_IPIP | MODE_GUE);
                let addr = SocketAddr::new(backend.addr.into(), backend.port as u16);
                Some(Connection::new(flow, addr, source, is_direct))
            })
            .collect();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = provoke(&connections) {
                warn!(%error, "connections whose time is up are reset with their next packet only");
            }
        });
        let text =
            format!("{count} connections were idle for too long, or their backend drained: reset");
        self.events.note(EventKind::Flows, text);
        info!(connections = count, "idle for too long, or drained: reset");
    }
}
