//! Another configuration for a running agent.
//!
//! The source is read in a thread of its own; then the network watcher asks the kernel about what is new in the text;
//! then the text is replaced, if the reload is an edit, as the last thing that can fail; then everything is swapped at
//! once. Until then nothing has changed, and any mistake leaves it so.

use std::{collections::VecDeque, error::Error, future, mem, path::PathBuf, sync::Arc};

use slb_api::{Edit, EventKind, ProblemName, Reloaded};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::{
    Agent,
    attacher::Attacher,
    config_cache::{ConfigCache, Parsed, Replacement},
    file_job::{FileJob, FileJobs, JobFailure, WITHIN, Wanted},
    reconciler::chunks,
    watcher::{NetworkSnapshot, WatchOrder, WatchSpec},
};
use crate::{
    api::Refusal,
    config::{
        Config, Mistake, changes,
        source::{ConfigSource, ReplaceError},
    },
    contained,
    error_chain::error_chain,
    ids::Ids,
};

/// Where the result of a command goes.
pub(super) type Answer = oneshot::Sender<Result<Reloaded, Refusal>>;

/// What has asked for a configuration.
pub(super) enum Origin {
    /// The source, which may have changed: a file says so by SIGHUP.
    Source,
    /// `slb reload`.
    Reload(Answer),
    /// A command that edits the file.
    Edit(Answer),
}

impl Origin {
    /// Whether the command has given up and said so: a change after that would be a surprise.
    fn is_gone(&self) -> bool {
        match self {
            Self::Source => false,
            Self::Reload(answer) | Self::Edit(answer) => answer.is_closed(),
        }
    }

    fn reply(self, result: Result<Reloaded, Refusal>) {
        match self {
            Self::Source => {}
            // The command may have gone away.
            Self::Reload(answer) | Self::Edit(answer) => drop(answer.send(result)),
        }
    }
}

/// A request that waits for its turn.
struct ReloadRequest {
    edit: Option<Edit>,
    origin: Origin,
}

/// The configuration, and the text to replace the present one by, if it is an edit.
type Read = Result<(Parsed, Option<Replacement>), Refusal>;

/// A configuration that is about to be put in force.
pub(super) struct Candidate {
    config: Config,
    /// `None`: the configuration is the one in force already.
    ids: Option<Ids>,
    warnings: Vec<Mistake>,
    replacement: Option<Replacement>,
    /// What differs from the configuration in force, in words.
    changes: Vec<String>,
    /// That of this configuration, if it concerns another part of the network than before.
    network: Option<NetworkSnapshot>,
    origin: Origin,
}

/// How far a reload is.
enum State {
    /// There is none.
    Idle,
    /// The file is being read.
    Parsing(Origin, FileJob<Read>),
    /// The network watcher looks at what is new in the configuration.
    AwaitingNetwork(Box<Candidate>, oneshot::Receiver<NetworkSnapshot>),
    /// The file is being replaced.
    Applying(Box<Candidate>, FileJob<Result<(), ReplaceError>>),
}

/// A step of a reload has ended.
pub(super) enum ReloadEvent {
    /// The file was read.
    Parsed(Origin, Box<Result<Read, JobFailure>>),
    /// This is what the kernel knows about the configuration.
    NetworkFound(Box<Candidate>),
    /// The file was replaced.
    Replaced(Box<Candidate>, Result<Result<(), ReplaceError>, JobFailure>),
}

/// Carries out reloads, one at a time: two edits of the same text would undo each other.
pub(super) struct Reloader {
    source: Arc<dyn ConfigSource>,
    orders: mpsc::UnboundedSender<WatchOrder>,
    /// What is watched, by the last order.
    spec: WatchSpec,
    file_jobs: FileJobs,
    cache: ConfigCache,
    state: State,
    waiting: VecDeque<ReloadRequest>,
    /// Counts configurations; the first is 1.
    pub generation: u64,
    /// How many reloads were refused.
    pub failures: u64,
    /// Why the last reload was refused, until one is not.
    pub refused: Option<String>,
}

impl Reloader {
    pub(super) fn new(
        source: Arc<dyn ConfigSource>,
        orders: mpsc::UnboundedSender<WatchOrder>,
        spec: WatchSpec,
    ) -> Self {
        Self {
            source,
            orders,
            spec,
            file_jobs: FileJobs::default(),
            cache: ConfigCache::default(),
            state: State::Idle,
            waiting: VecDeque::new(),
            generation: 1,
            failures: 0,
            refused: None,
        }
    }

    /// Whether a reload is under way.
    pub(super) const fn is_busy(&self) -> bool {
        !matches!(self.state, State::Idle)
    }

    /// Waits for the end of the present step; without one, for ever. Cancel-safe.
    pub(super) async fn event(&mut self) -> ReloadEvent {
        match &mut self.state {
            State::Idle => {}
            State::Parsing(_, job) => {
                let read = job.ended().await;
                if let State::Parsing(origin, _) = mem::replace(&mut self.state, State::Idle) {
                    return ReloadEvent::Parsed(origin, Box::new(read));
                }
            }
            State::AwaitingNetwork(candidate, found) => {
                // Without a watcher the agent is about to end.
                if let Ok(network) = found.await {
                    candidate.network = Some(network);
                    let state = mem::replace(&mut self.state, State::Idle);
                    if let State::AwaitingNetwork(candidate, _) = state {
                        return ReloadEvent::NetworkFound(candidate);
                    }
                }
            }
            State::Applying(_, job) => {
                let replaced = job.ended().await;
                if let State::Applying(candidate, _) = mem::replace(&mut self.state, State::Idle) {
                    return ReloadEvent::Replaced(candidate, replaced);
                }
            }
        }
        future::pending().await
    }

    /// The next request whose command still waits, unless a reload is under way.
    fn next(&mut self) -> Option<ReloadRequest> {
        while !self.is_busy() {
            let request = self.waiting.pop_front()?;
            if !request.origin.is_gone() {
                return Some(request);
            }
        }
        None
    }

    /// Begins to read the source. Gives the origin back if that cannot be begun.
    fn parse(
        &mut self,
        ReloadRequest { edit, origin }: ReloadRequest,
        in_force: Arc<Config>,
    ) -> Option<Origin> {
        let (source, cache) = (Arc::clone(&self.source), self.cache.clone());
        let job = self.file_jobs.start(move |_| match edit {
            None => cache.read(&*source, &in_force).map(|read| (read, None)),
            Some(edit) => cache.edited(&*source, &edit),
        });
        match job {
            Some(job) => {
                self.state = State::Parsing(origin, job);
                None
            }
            None => Some(origin),
        }
    }

    /// Has the network watcher look at what a candidate needs.
    fn await_network(&mut self, candidate: Box<Candidate>, spec: WatchSpec) {
        let (found, is_found) = oneshot::channel();
        self.order(spec, Some(found));
        self.state = State::AwaitingNetwork(candidate, is_found);
    }

    /// Has the network watcher watch something else.
    pub(super) fn order(
        &mut self,
        spec: WatchSpec,
        found: Option<oneshot::Sender<NetworkSnapshot>>,
    ) {
        self.spec = spec.clone();
        // It is gone only when the agent ends.
        let _ = self.orders.send(WatchOrder { spec, found });
    }
}

impl Agent {
    /// Reads the file ahead of the first edit.
    pub(super) fn prepare_edits(&self) {
        let (source, cache) = (Arc::clone(&self.reloader.source), self.reloader.cache.clone());
        // The first edit reports the mistakes that the file has by now.
        let config = Arc::clone(&self.config);
        let read = move || drop(cache.read(&*source, &config));
        tokio::task::spawn_blocking(contained::blocking(read));
    }

    /// Reads the file again, and puts it in force.
    pub(super) fn reload(&mut self, origin: Origin) {
        let is_change = |request: &ReloadRequest| matches!(request.origin, Origin::Source);
        if matches!(origin, Origin::Source) && self.reloader.waiting.iter().any(is_change) {
            // One that has not begun reads the same text.
            return;
        }
        self.reloader.waiting.push_back(ReloadRequest { edit: None, origin });
        self.begin_next();
    }

    /// Changes the file, and puts it in force.
    pub(super) fn edit(&mut self, edit: Edit, answer: Answer) {
        let origin = Origin::Edit(answer);
        self.reloader.waiting.push_back(ReloadRequest { edit: Some(edit), origin });
        self.begin_next();
    }

    fn begin_next(&mut self) {
        while let Some(request) = self.reloader.next() {
            if let Some(origin) = self.reloader.parse(request, Arc::clone(&self.config)) {
                self.refuse(origin, Refusal::FileHangs { path: self.path.to_path_buf() });
            }
        }
    }

    /// Goes on with a reload.
    pub(super) fn reload_event(&mut self, event: ReloadEvent) {
        let path = self.path.to_path_buf();
        let seconds = WITHIN.as_secs();
        match event {
            ReloadEvent::Parsed(origin, read) => match *read {
                Ok(Ok((parsed, replacement))) => self.consider(parsed, replacement, origin),
                Ok(Err(refusal)) => self.refuse(origin, refusal),
                Err(JobFailure::Late) => self.refuse(origin, Refusal::FileSlow { path, seconds }),
                Err(JobFailure::Panicked) => self.refuse(origin, Refusal::Defect { path }),
            },
            ReloadEvent::NetworkFound(candidate) => self.replace_file(candidate),
            ReloadEvent::Replaced(candidate, replaced) => match replaced {
                Ok(Ok(())) => self.swap(*candidate),
                Ok(Err(why)) => self.give_up(*candidate, Refusal::Unwritable { path, why }),
                Err(_) => self.give_up(*candidate, Refusal::NotReplaced { path, seconds }),
            },
        }
        self.begin_next();
    }

    /// What a reload with another file would change.
    pub(super) fn plan(&self, config: &Config) -> Result<Reloaded, Refusal> {
        self.prepare(config)?;
        Ok(Reloaded {
            generation: self.reloader.generation,
            changes: changes(&self.config, config),
            warnings: Vec::new(),
        })
    }

    /// Looks at a file that was read.
    fn consider(
        &mut self,
        (mut config, warnings): Parsed,
        replacement: Option<Replacement>,
        origin: Origin,
    ) {
        config.share(&self.config);
        let candidate = |config, ids| {
            let changes = Vec::new();
            Box::new(Candidate {
                config,
                ids,
                warnings,
                replacement,
                changes,
                network: None,
                origin,
            })
        };
        if config == *self.config {
            return self.replace_file(candidate(config, None));
        }
        let ids = match self.prepare(&config) {
            Ok(ids) => ids,
            Err(refusal) => return self.give_up(*candidate(config, None), refusal),
        };
        let spec = WatchSpec::new(&config, &ids);
        let is_alike =
            spec == self.reloader.spec && config.gateway.xdp_mode == self.config.gateway.xdp_mode;
        let candidate = candidate(config, Some(ids));
        if is_alike {
            // Nothing that the kernel would have to be asked about.
            return self.replace_file(candidate);
        }
        self.reloader.await_network(candidate, spec);
    }

    /// Whether the running agent can put a configuration in force.
    fn prepare(&self, config: &Config) -> Result<Ids, Refusal> {
        let (was, is) = (&self.config.gateway, &config.gateway);
        for (key, was, is) in [
            ("api", Some(&was.api), Some(&is.api)),
            ("monitor", was.monitor.as_ref(), is.monitor.as_ref()),
            ("pins", Some(&was.pins), Some(&is.pins)),
        ] {
            if was != is {
                let write = |was: &PathBuf| format!("write \"{}\"", was.display());
                let was = was.map_or("leave it out".to_owned(), write);
                return Err(Refusal::Fixed { path: self.path.to_path_buf(), key, was });
            }
        }
        let installed = self.datapath.maps.installed();
        let ids = self.backends.ids.reassign(&self.config, config, installed)?;
        let (needed, capacity) = (chunks(config), self.datapath.maps.chunks());
        // For the schedules before, and to write new ones beside the old.
        if 3 * needed > capacity {
            return Err(Refusal::NoRoomForSchedules { needed, capacity });
        }
        Ok(ids)
    }

    /// Replaces the text of the source by a candidate's, if the candidate is an edit.
    ///
    /// The network watcher waits meanwhile: it goes on when its snapshot is taken, or dropped.
    fn replace_file(&mut self, mut candidate: Box<Candidate>) {
        let network = candidate.network.as_ref().unwrap_or(&self.network);
        let checked = match candidate.ids {
            // What is wrong with the others is a problem already, and no reason to refuse what does not concern them.
            Some(_) => {
                let before = Some(&*self.config);
                Attacher::check(&self.datapath, &candidate.config, before, network)
            }
            None => Ok(()),
        };
        if let Err(error) = checked {
            return self.give_up(*candidate, Refusal::Interface(error));
        }
        let job = candidate.replacement.take().map(|replacement| {
            let source = Arc::clone(&self.reloader.source);
            let replace = move |wanted: Wanted| replacement.commit(&*source, &|| wanted.holds());
            self.reloader.file_jobs.start(replace)
        });
        // While the file is written.
        if candidate.ids.is_some() {
            candidate.changes = changes(&self.config, &candidate.config);
        }
        match job {
            None => self.swap(*candidate),
            Some(Some(job)) => self.reloader.state = State::Applying(candidate, job),
            Some(None) => {
                self.give_up(*candidate, Refusal::FileHangs { path: self.path.to_path_buf() });
            }
        }
    }

    /// Does not put a candidate in force.
    fn give_up(&mut self, candidate: Candidate, refusal: Refusal) {
        let Candidate { network, origin, .. } = candidate;
        if network.is_some() {
            let spec = WatchSpec::new(&self.config, &self.backends.ids);
            self.reloader.order(spec, None);
        }
        self.refuse(origin, refusal);
    }

    /// Puts a candidate in force that the file has now.
    fn swap(&mut self, candidate: Candidate) {
        let Candidate { config, ids, warnings, changes, network, origin, .. } = candidate;
        let Some(ids) = ids else {
            self.reloader.refused = None;
            info!("reloaded; the configuration is what it was");
            return self.done(origin, Vec::new(), &warnings);
        };
        let is_elsewhere = network.is_some();
        if let Some(network) = network {
            self.network = network;
        }
        let was = mem::replace(&mut self.config, Arc::new(config));
        self.adopt(ids);
        self.reloader.generation += 1;
        self.reloader.refused = None;
        let is_done = self.put_in_force(&was, is_elsewhere);
        self.serve_metrics();
        self.network.take();
        for change in &changes {
            let generation = self.reloader.generation;
            info!(generation, "{change}");
            self.events.note(EventKind::Config, format!("generation {generation}: {change}"));
        }
        if is_done {
            self.done(origin, changes, &warnings);
        } else {
            let failures = self.failures.problems().map(|problem| problem.text).collect();
            self.publish();
            origin.reply(Err(Refusal::Incomplete { failures }));
        }
    }

    /// Brings the datapath in line with the configuration, and says whether it is; what fails is tried again.
    fn put_in_force(&mut self, was: &Config, is_elsewhere: bool) -> bool {
        let (was, is) = (&was.gateway, &self.config.gateway);
        let moves = was.interfaces != is.interfaces || was.xdp_mode != is.xdp_mode;
        if was.xdp_mode != is.xdp_mode {
            self.attacher.forget();
        }
        let mut is_done = self.set_and_reconcile();
        if moves {
            self.attacher.keep(&self.config);
            is_done &= self.attempt(ProblemName::XdpNotAttached, Self::attach);
            is_done &= self.attempt(ProblemName::XdpNotDetached, |agent| {
                agent.datapath.detach_others(&agent.config.gateway.interfaces)
            });
            // The mode is known only now.
            is_done &= self.set_and_reconcile();
        }
        if moves || is_elsewhere && self.network.outdates_clients {
            is_done &= self.attempt(ProblemName::RoutesOutdated, |agent| {
                agent.datapath.maps.next_route_epoch()
            });
        }
        is_done
    }

    fn set_and_reconcile(&mut self) -> bool {
        self.attempt(ProblemName::SettingsNotWritten, Self::set) & self.reconcile()
    }

    /// Does something that is tried again if it fails, and says whether it did not.
    pub(super) fn attempt<E: Error + 'static>(
        &mut self,
        problem: ProblemName,
        attempt: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> bool {
        let result = attempt(self);
        let is_done = result.is_ok();
        self.failures.note(problem, result);
        is_done
    }

    fn done(&mut self, origin: Origin, changes: Vec<String>, warnings: &[Mistake]) {
        let warnings: Vec<String> = warnings.iter().map(ToString::to_string).collect();
        for warning in &warnings {
            warn!("{warning}");
        }
        let generation = self.reloader.generation;
        self.publish();
        origin.reply(Ok(Reloaded { generation, changes, warnings }));
    }

    /// Answers why a configuration is not put in force. An edit that is refused says nothing about the file, so it is
    /// no failed reload.
    fn refuse(&mut self, origin: Origin, refusal: Refusal) {
        let text = error_chain(&refusal);
        let what = match origin {
            Origin::Source | Origin::Reload(_) => {
                self.reloader.failures += 1;
                self.reloader.refused = Some(format!("the last reload was refused: {text}"));
                "reload"
            }
            Origin::Edit(_) => "edit",
        };
        warn!("{what} refused, nothing was changed:\n{text}");
        self.events.note(EventKind::Config, format!("{what} refused: {text}"));
        self.publish();
        origin.reply(Err(refusal));
    }

    /// Replaces the ids.
    pub(super) fn adopt(&mut self, ids: Ids) {
        self.reconciler.keep(&ids);
        if self.backends.adopt(ids) {
            self.check_health();
        }
    }
}
