//! Reads the latest snapshot and the datapath's maps. For threads that may wait.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Instant, SystemTime},
};

use slb_api::{
    Event, ExplainRequest, ExplainResponse, FlowFilter, Flows, FragmentPart, PacketProtocol,
    Problem, ProblemName, Status,
};
use slb_common::{
    abi::{Counter, TCP, UDP},
    verdict::Verdict,
};
use tokio::sync::watch;

use super::{
    EventLog, Names, ProblemLog, Snapshot,
    rates::{Sample, Samples},
    status::{self, Measured},
};
use crate::{
    clock::Jiffies,
    datapath::{
        Counters, Explainer, Explanation, FlowTable, Kind, Part, Pins, Question, TableError,
    },
    net::local_source_problems,
};

/// Something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A map.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A map that an explanation looks into.
    #[error("cannot read the maps of the datapath")]
    Map(#[from] aya::maps::MapError),
    /// The kernel's clock.
    #[error("cannot read the kernel's clock")]
    Clock(#[from] io::Error),
}

/// A packet cannot be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// No packet has such addresses.
    #[error("{src} and {dst} are of different families")]
    Families {
        /// The source.
        src: SocketAddr,
        /// The destination.
        dst: SocketAddr,
    },
    /// No router sends an error about what echo requests say.
    #[error("icmp_error is about TCP or UDP")]
    ErrorAboutIcmp,
    /// Only later fragments are looked up by their identification.
    #[error("fragment_id is that of a later fragment: fragment has to be \"later\"")]
    FragmentId,
    /// XDP is not attached there.
    #[error("interface {name:?}: XDP is attached to {attached}")]
    Interface {
        /// What was asked for.
        name: String,
        /// The interfaces that there are.
        attached: String,
    },
    /// The maps could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// What operators can look at. Its functions wait for the kernel.
pub trait Observer: Send + Sync + 'static {
    /// How things are.
    ///
    /// # Errors
    ///
    /// [`ReadError`].
    fn status(&self) -> Result<Status, ReadError>;

    /// The flows that have entries.
    ///
    /// # Errors
    ///
    /// [`ReadError`].
    fn flows(&self, filter: &FlowFilter) -> Result<Flows, ReadError>;

    /// What would become of a packet.
    ///
    /// # Errors
    ///
    /// [`ExplainError`].
    fn explain(&self, request: &ExplainRequest) -> Result<ExplainResponse, ExplainError>;

    /// The events after a number, the oldest first.
    fn events(&self, after: u64) -> Vec<Event>;
}

/// Reads the snapshots and the maps of a running agent.
pub struct StatusReader {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    events: EventLog,
    counters: Arc<Counters>,
    table: FlowTable,
    explainer: Explainer,
    jiffies: Jiffies,
    samples: Mutex<Samples>,
    problems: Mutex<ProblemLog>,
}

impl StatusReader {
    /// Opens the pinned maps, besides `table`: to map the memory of a large one takes a while.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(
        pins: &Pins,
        table: FlowTable,
        jiffies: Jiffies,
        counters: Arc<Counters>,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        events: EventLog,
    ) -> Result<Self, TableError> {
        Ok(Self {
            snapshots,
            events,
            counters,
            explainer: Explainer::open(pins, table.clone())?,
            table,
            jiffies,
            samples: Mutex::default(),
            problems: Mutex::default(),
        })
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }

    /// The problems that the snapshot has, and those that only the counters tell of.
    fn all_problems(&self, snapshot: &Snapshot, verdicts: &[(Verdict, Counter)]) -> Vec<Problem> {
        let found = lost_replies(snapshot, verdicts);
        let mut log = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        let mut problems = log.update(found, SystemTime::now());
        problems.extend(snapshot.problems.iter().cloned());
        Problem::sort(&mut problems);
        problems
    }
}

/// A reply that is left to the kernel has the VIP as its source: if that is an address of this host, IPv4 takes the
/// packet for a forgery, unless it is set otherwise.
fn lost_replies(snapshot: &Snapshot, verdicts: &[(Verdict, Counter)]) -> Vec<Problem> {
    let is_left = |(verdict, count): &(Verdict, Counter)| {
        *verdict == Verdict::RepliedByKernel && count.packets > 0
    };
    if !verdicts.iter().any(is_left) {
        return Vec::new();
    }
    let interfaces = snapshot.reply_interfaces.iter();
    let texts = local_source_problems(interfaces.map(String::as_str)).into_iter();
    texts.map(|text| Problem::new(ProblemName::RepliesDroppedByKernel, text)).collect()
}

impl Observer for StatusReader {
    fn status(&self) -> Result<Status, ReadError> {
        let snapshot = self.snapshot();
        let at = Instant::now();
        let traffic = Arc::new(self.counters.traffic(0..snapshot.installed.backends())?);
        let verdicts = self.counters.verdicts()?;
        let sample = Sample { at, traffic };
        let before = self.samples.lock().unwrap_or_else(PoisonError::into_inner).add(&sample);
        let problems = self.all_problems(&snapshot, &verdicts);
        let measured = Measured {
            sample,
            before,
            verdicts,
            active: &|backend| self.table.active(backend),
            jiffies: self.jiffies,
            now: self.jiffies.now().ok(),
        };
        Ok(status::status(&snapshot, &measured, problems))
    }

    fn flows(&self, filter: &FlowFilter) -> Result<Flows, ReadError> {
        let (names, now) = (Names::new(&self.snapshot()), self.jiffies.now()?);
        Ok(names.select(self.table.flows(), filter, now, self.jiffies.per(1)))
    }

    fn explain(&self, request: &ExplainRequest) -> Result<ExplainResponse, ExplainError> {
        let mut question = question(request)?;
        if let Some(name) = &request.interface {
            question.ingress = ingress(name, &self.snapshot())?;
        }
        let now = self.jiffies.now().map_err(ReadError::from)?;
        let explained = self.explainer.explain(&question, now).map_err(ReadError::from)?;
        let Explanation { steps, verdict, backend, to, from } = explained;
        let names = Names::new(&self.snapshot());
        let steps = steps.into_iter().map(|step| [step.what.to_owned(), names.put(&step.found)]);
        Ok(ExplainResponse {
            steps: steps.collect(),
            verdict: verdict.map(|verdict| verdict.label().to_owned()),
            backend: backend.map(|id| names.backend(id)),
            to: to.map(|to| to.to_string()),
            from: from.map(|from| from.to_string()),
        })
    }

    fn events(&self, after: u64) -> Vec<Event> {
        self.events.after(after)
    }
}

/// The packet that a request is about.
fn question(request: &ExplainRequest) -> Result<Question, ExplainError> {
    let ExplainRequest { protocol, src, dst, established, ttl, .. } = *request;
    if src.is_ipv4() != dst.is_ipv4() {
        return Err(ExplainError::Families { src, dst });
    }
    let (kind, proto) = match protocol {
        PacketProtocol::Icmp if request.icmp_error => return Err(ExplainError::ErrorAboutIcmp),
        PacketProtocol::Icmp => (Kind::Echo, UDP),
        PacketProtocol::Tcp => (Kind::Transport, TCP),
        PacketProtocol::Udp => (Kind::Transport, UDP),
    };
    let part = match (request.fragment, request.fragment_id) {
        (None, None) => Part::Whole,
        (Some(FragmentPart::First), None) => Part::First,
        (Some(FragmentPart::Later), id) => Part::Later(id),
        (_, Some(_)) => return Err(ExplainError::FragmentId),
    };
    let mut question = Question::new(proto, canonical(src), canonical(dst));
    question.kind = if request.icmp_error { Kind::Error } else { kind };
    question.is_established = established;
    question.part = part;
    question.ttl = ttl.unwrap_or(question.ttl);
    Ok(question)
}

/// Index of an interface that packets come in by.
fn ingress(name: &str, snapshot: &Snapshot) -> Result<u32, ExplainError> {
    let found = snapshot.interfaces.iter().find(|interface| interface.name == name);
    found.map(|interface| interface.index).ok_or_else(|| {
        let names = snapshot.interfaces.iter().map(|interface| interface.name.as_str());
        let attached = names.collect::<Vec<_>>().join(", ");
        ExplainError::Interface { name: name.to_owned(), attached }
    })
}

fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}
