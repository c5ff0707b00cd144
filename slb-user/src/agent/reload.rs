//! Another configuration for a running agent.
//!
//! A file is read in a thread of its own; then the follower asks the kernel about what is new in it; then the file is
//! replaced, if that was asked for, as the last thing that can fail; then everything is swapped at once. Until then
//! nothing has changed, and any mistake leaves it so.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    error::Error,
    mem,
    sync::Arc,
    time::Instant,
};

use slb_api::{EventKind, ProblemName, Reloaded};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::{
    Agent, SWEEP_SLACK,
    atomic_write::AtomicWrite,
    config_cache::{ConfigCache, Parsed},
    file_job::{FileJob, FileJobs, Outcome, WITHIN},
    follow::{Following, Surroundings},
};
use crate::{
    api::Refusal,
    causes::causes,
    config::{Config, Edit, Mistake, changes},
    contained,
    health::Health,
    layout::{Layout, Service, Target},
    plan::{Step, retire},
};

/// Who asked for a reload, and waits for how it ends.
pub(super) type Answer = oneshot::Sender<Result<Reloaded, Refusal>>;

/// What a job on the file is for.
pub(super) enum Work {
    /// To know what it says.
    Read(Option<Answer>),
    /// To go by this configuration as soon as the file says it.
    Replace(Box<Pending>),
}

/// A configuration that waits for what the kernel knows, and then for the file to be replaced.
pub(super) struct Pending {
    config: Config,
    /// `None`: the configuration is the one that the agent goes by already.
    layout: Option<Layout>,
    warnings: Vec<Mistake>,
    staged: Option<AtomicWrite>,
    /// Those of this configuration, if they are others than before.
    surroundings: Option<Surroundings>,
    answer: Option<Answer>,
}

/// What somebody asks for.
enum Wish {
    Reload(Option<Answer>),
    Edit(Edit, Answer),
}

impl Wish {
    const fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Reload(answer) => answer.as_ref(),
            Self::Edit(_, answer) => Some(answer),
        }
    }

    /// The command has given up and said so: a change after that would be a surprise.
    fn is_given_up(&self) -> bool {
        self.answer().is_some_and(Answer::is_closed)
    }
}

/// How far reloads are.
pub(super) struct Reloads {
    orders: mpsc::UnboundedSender<Following>,
    file_jobs: FileJobs,
    /// The running job on the file.
    job: Option<(Work, FileJob)>,
    /// What waits for the follower.
    pending: Option<Box<Pending>>,
    /// Who asked meanwhile.
    waiting: VecDeque<Wish>,
    /// What the follower was told last.
    following: Following,
    cache: ConfigCache,
    /// Counts configurations; the first is 1.
    pub generation: u64,
    /// How many were refused.
    pub failures: u64,
    /// Why the last one was refused, until one is not.
    pub refused: Option<String>,
}

impl Reloads {
    pub fn new(orders: mpsc::UnboundedSender<Following>, following: Following) -> Self {
        Self {
            orders,
            file_jobs: FileJobs::default(),
            job: None,
            pending: None,
            waiting: VecDeque::new(),
            following,
            cache: ConfigCache::default(),
            generation: 1,
            failures: 0,
            refused: None,
        }
    }

    /// Whether one is under way.
    const fn is_busy(&self) -> bool {
        self.job.is_some() || self.pending.is_some()
    }

    /// Waits for the end of the running job; without one, for ever. Cancel-safe.
    pub async fn ended(&mut self) -> (Work, Outcome) {
        let outcome = match &mut self.job {
            Some((_, job)) => job.ended().await,
            None => std::future::pending().await,
        };
        let (work, _) = self.job.take().expect("it was there before the wait");
        (work, outcome)
    }

    /// Has the follower look around for something else.
    fn order(&mut self, mut following: Following) {
        following.number = self.following.number + 1;
        self.following = following.clone();
        // It is gone only when the agent ends.
        let _ = self.orders.send(following);
    }
}

impl Agent {
    /// Reads the file ahead of the first edit.
    pub(super) fn prepare_edits(&self) {
        let (path, cache) = (self.path.clone(), self.reloads.cache.clone());
        // What is wrong with it by now, whoever edits it is told.
        tokio::task::spawn_blocking(contained::blocking(move || drop(cache.read(&path))));
    }

    /// Reads the file again, and goes by it.
    pub(super) fn reload(&mut self, answer: Option<Answer>) {
        let is_signal = |wish: &Wish| wish.answer().is_none();
        if answer.is_none() && self.reloads.waiting.iter().any(is_signal) {
            // One that has not begun reads the same file.
            return;
        }
        self.reloads.waiting.push_back(Wish::Reload(answer));
        self.next();
    }

    /// Changes the file, and goes by it.
    pub(super) fn edit(&mut self, edit: Edit, answer: Answer) {
        self.reloads.waiting.push_back(Wish::Edit(edit, answer));
        self.next();
    }

    /// Begins what has waited, one at a time: two edits of the same text would undo each other.
    fn next(&mut self) {
        while !self.reloads.is_busy()
            && let Some(wish) = self.reloads.waiting.pop_front()
        {
            if !wish.is_given_up() {
                self.begin(wish);
            }
        }
    }

    fn begin(&mut self, wish: Wish) {
        let (path, cache) = (self.path.clone(), self.reloads.cache.clone());
        let (edit, answer) = match wish {
            Wish::Reload(answer) => (None, answer),
            Wish::Edit(edit, answer) => (Some(edit), Some(answer)),
        };
        let job = self.reloads.file_jobs.start(move |_| {
            let read = match edit {
                None => cache.read(&path).map(|read| (read, None)),
                Some(edit) => cache.edited(&path, &edit),
            };
            Outcome::Read(Box::new(read))
        });
        match job {
            Some(job) => self.reloads.job = Some((Work::Read(answer), job)),
            None => self.refuse(answer, self.hangs()),
        }
    }

    /// Why no more work on the file is begun.
    fn hangs(&self) -> Refusal {
        Refusal::FileHangs { path: self.path.to_path_buf() }
    }

    /// Goes on with a reload.
    pub(super) fn file_job_ended(&mut self, work: Work, outcome: Outcome) {
        let path = self.path.to_path_buf();
        let seconds = WITHIN.as_secs();
        match (work, outcome) {
            (Work::Read(answer), Outcome::Read(read)) => match *read {
                Ok((parsed, staged)) => self.consider(parsed, staged, answer),
                Err(refusal) => self.refuse(answer, refusal),
            },
            (Work::Read(answer), Outcome::Late) => {
                self.refuse(answer, Refusal::FileSlow { path, seconds });
            }
            (Work::Read(answer), _) => self.refuse(answer, Refusal::Defect { path }),
            (Work::Replace(pending), Outcome::Replaced(Ok(()))) => self.swap(*pending),
            (Work::Replace(pending), Outcome::Replaced(Err(why))) => {
                self.give_up(*pending, Refusal::Unwritable { path, why });
            }
            (Work::Replace(pending), _) => {
                self.give_up(*pending, Refusal::NotReplaced { path, seconds });
            }
        }
        self.next();
    }

    /// What a reload with another file would change.
    pub(super) fn plan(&self, config: &Config) -> Result<Reloaded, Refusal> {
        self.prepare(config)?;
        Ok(Reloaded {
            generation: self.reloads.generation,
            changes: changes(&self.config, config),
            warnings: Vec::new(),
        })
    }

    /// Looks at a file that was read.
    fn consider(
        &mut self,
        (config, warnings): Parsed,
        staged: Option<AtomicWrite>,
        answer: Option<Answer>,
    ) {
        let pending = |config, layout| {
            Box::new(Pending { config, layout, warnings, staged, surroundings: None, answer })
        };
        if config == *self.config {
            self.reloads.pending = Some(pending(config, None));
            return self.replace_file(None);
        }
        let layout = match self.prepare(&config) {
            Ok(layout) => layout,
            Err(refusal) => return self.give_up(*pending(config, None), refusal),
        };
        let following = Following::new(&config, &layout);
        let is_alike = following.is_like(&self.reloads.following)
            && config.gateway.xdp_mode == self.config.gateway.xdp_mode;
        self.reloads.pending = Some(pending(config, Some(layout)));
        if is_alike {
            // Nothing that the kernel would have to be asked about.
            return self.replace_file(None);
        }
        self.reloads.order(following);
    }

    /// Whether the running agent can go by a configuration.
    fn prepare(&self, config: &Config) -> Result<Layout, Refusal> {
        let (was, is) = (&self.config.gateway, &config.gateway);
        for (key, was, is) in [("api", &was.api, &is.api), ("pins", &was.pins, &is.pins)] {
            if was != is {
                return Err(Refusal::Fixed {
                    path: self.path.to_path_buf(),
                    key,
                    was: was.clone(),
                });
            }
        }
        let layout = Layout::new(config, self.datapath.maps.installed());
        let layout = layout?;
        let (needed, capacity) = (super::chunks(config), self.datapath.maps.chunks());
        // For the schedules before, and to write new ones beside the old.
        if 3 * needed > capacity {
            return Err(Refusal::NoRoomForSchedules { needed, capacity });
        }
        Ok(layout)
    }

    /// Whether these are the surroundings that the pending configuration waits for.
    pub(super) fn awaits(&self, surroundings: &Surroundings) -> bool {
        self.reloads.pending.is_some() && surroundings.number == self.reloads.following.number
    }

    /// Goes on with the pending configuration: this is what the kernel knows about it.
    pub(super) fn network_known(&mut self, surroundings: Surroundings) {
        self.replace_file(Some(surroundings));
        self.next();
    }

    /// Replaces the file by the pending configuration, whose surroundings these are, if they are others than before.
    ///
    /// The follower waits meanwhile: it goes on when its surroundings are taken, or dropped.
    fn replace_file(&mut self, surroundings: Option<Surroundings>) {
        let Some(mut pending) = self.reloads.pending.take() else { return };
        pending.surroundings = surroundings;
        let around = pending.surroundings.as_ref().unwrap_or(&self.surroundings);
        let mut interfaces = pending.config.gateway.interfaces.iter();
        let checked = match pending.layout {
            Some(_) => interfaces.try_for_each(|name| self.check_interface(around, name)),
            None => Ok(()),
        };
        if let Err(error) = checked {
            return self.give_up(*pending, Refusal::Interface(error));
        }
        let Some(staged) = pending.staged.take() else { return self.swap(*pending) };
        let commit = move |wanted| Outcome::Replaced(staged.commit(&wanted));
        match self.reloads.file_jobs.start(commit) {
            Some(job) => self.reloads.job = Some((Work::Replace(pending), job)),
            None => self.give_up(*pending, self.hangs()),
        }
    }

    /// Does not go by a configuration.
    fn give_up(&mut self, pending: Pending, refusal: Refusal) {
        let Pending { surroundings, staged, answer, .. } = pending;
        if surroundings.is_some() {
            self.reloads.order(Following::new(&self.config, &self.layout));
        }
        if staged.is_some() {
            // Removes a file.
            tokio::task::spawn_blocking(move || drop(staged));
        }
        self.refuse(answer, refusal);
    }

    /// Goes by a configuration that the file has now.
    fn swap(&mut self, pending: Pending) {
        let Pending { config, layout, warnings, surroundings, answer, .. } = pending;
        let Some(layout) = layout else {
            self.reloads.refused = None;
            info!("reloaded; the configuration is what it was");
            return self.done(answer, Vec::new(), &warnings);
        };
        let is_elsewhere = surroundings.is_some();
        if let Some(surroundings) = surroundings {
            self.surroundings = surroundings;
        }
        let changes = changes(&self.config, &config);
        let was = mem::replace(&mut self.config, Arc::new(config));
        self.adopt(layout);
        let (was, is) = (&was.gateway, &self.config.gateway);
        let moves = was.interfaces != is.interfaces || was.xdp_mode != is.xdp_mode;
        if was.xdp_mode != is.xdp_mode {
            self.attachments.clear();
        }
        self.reloads.generation += 1;
        self.reloads.refused = None;
        let mut is_done = self.set_and_reconcile();
        if moves {
            self.attachments
                .retain(|(known, _)| self.config.gateway.interfaces.contains(&known.name));
            is_done &= self.go_on(ProblemName::XdpNotAttached, Self::attach);
            is_done &= self.go_on(ProblemName::XdpNotDetached, |agent| {
                agent.datapath.detach_others(&agent.config.gateway.interfaces)
            });
            // In which mode, nobody knew before.
            is_done &= self.set_and_reconcile();
        }
        if moves || is_elsewhere && self.surroundings.outdates_clients {
            is_done &= self
                .go_on(ProblemName::RoutesOutdated, |agent| agent.datapath.maps.next_route_epoch());
        }
        self.serve_metrics();
        self.surroundings.take();
        for change in &changes {
            info!(generation = self.reloads.generation, "{change}");
            self.events.note(
                EventKind::Config,
                format!("generation {}: {change}", self.reloads.generation),
            );
        }
        if is_done {
            self.done(answer, changes, &warnings);
        } else {
            let failures = self.failures.problems().map(|problem| problem.text).collect();
            self.publish();
            reply(answer, Err(Refusal::Incomplete { failures }));
        }
    }

    fn set_and_reconcile(&mut self) -> bool {
        self.go_on(ProblemName::SettingsNotWritten, Self::set) & self.reconcile()
    }

    /// Does something that is tried again if it fails, and says whether it did not.
    fn go_on<E: Error + 'static>(
        &mut self,
        problem: ProblemName,
        attempt: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> bool {
        let result = attempt(self);
        let is_done = result.is_ok();
        self.failures.note(problem, result);
        is_done
    }

    fn done(&mut self, answer: Option<Answer>, changes: Vec<String>, warnings: &[Mistake]) {
        let warnings: Vec<String> = warnings.iter().map(ToString::to_string).collect();
        for warning in &warnings {
            warn!("{warning}");
        }
        let generation = self.reloads.generation;
        self.publish();
        reply(answer, Ok(Reloaded { generation, changes, warnings }));
    }

    fn refuse(&mut self, answer: Option<Answer>, refusal: Refusal) {
        let text = causes(&refusal);
        warn!("reload refused, nothing was changed:\n{text}");
        self.events.note(EventKind::Config, format!("reload refused: {text}"));
        self.reloads.failures += 1;
        self.reloads.refused = Some(format!("the last reload was refused: {text}"));
        self.publish();
        reply(answer, Err(refusal));
    }

    /// Replaces the layout. Health goes with it only where a backend was checked before and is checked now.
    pub(super) fn adopt(&mut self, layout: Layout) {
        let before = Before::new(&self.layout);
        let mut health = Vec::with_capacity(layout.targets.len());
        let mut trusted = HashSet::new();
        for (service, target) in layout.services.iter().flat_map(|service| {
            layout.targets[service.targets.clone()].iter().map(move |target| (service, target))
        }) {
            let was = before.find(service, target).filter(|_| target.check.is_some());
            let was = was.map(|index| (&self.layout.targets[index], self.health[index]));
            let (known, is_trusted) = match was {
                Some((was, known)) if was.check.is_some() => {
                    (known, known == Health::Unknown && self.trusted.contains(&target.id))
                }
                Some((was, _)) => (Health::Unknown, !was.is_departed()),
                None => (Health::Unknown, false),
            };
            health.push(known);
            if is_trusted {
                trusted.insert(target.id);
            }
            if was.is_none() {
                self.suspicions.remove(&target.id);
            }
        }
        (self.health, self.trusted) = (Arc::new(health), trusted);
        let ids: HashSet<u32> = layout.targets.iter().map(|target| target.id).collect();
        Arc::make_mut(&mut self.history).retain(|id, _| ids.contains(id));
        self.planner.keep(&layout);
        self.layout = Arc::new(layout);
        self.note_departed();
        self.check_health();
    }

    /// Since when backends are there for the sake of their flows only.
    pub(super) fn note_departed(&mut self) {
        let now = Instant::now();
        let targets = self.layout.targets.iter();
        let since = targets
            .filter(|target| target.is_departed())
            .map(|target| (target.id, self.departed.get(&target.id).copied().unwrap_or(now)));
        self.departed = since.collect();
    }

    /// The backends that have departed so long ago that all flows that they still have left an entry.
    pub(super) fn leaving(&self) -> HashSet<u32> {
        let services = self.layout.services.iter();
        services
            .flat_map(|service| {
                let targets = self.layout.targets[service.targets.clone()].iter();
                targets.map(move |target| (target.id, service.idle_timeout + SWEEP_SLACK))
            })
            .filter(|(id, idle)| self.departed.get(id).is_some_and(|since| since.elapsed() > *idle))
            .map(|(id, _)| id)
            .chain(self.closed().into_iter().filter(|id| self.departed.contains_key(id)))
            .collect()
    }

    /// Forgets the backends of which no flow is left.
    pub(super) fn forget(&mut self, left: &HashSet<u32>) {
        if self.reloads.is_busy() {
            return;
        }
        // One may have come and gone again since that look.
        let over: Vec<u32> = self.leaving().intersection(left).copied().collect();
        if over.is_empty() {
            return;
        }
        let mut gone = Vec::new();
        for id in &over {
            let Some(&backend) = self.datapath.maps.installed().backends.get(id) else { continue };
            let address = self.layout.targets.iter().find(|target| target.id == *id);
            gone.push(address.map(|target| target.addr.to_string()).unwrap_or_default());
            self.go_on(ProblemName::MapsNotWritten, |agent| {
                agent.datapath.maps.apply(Step::PutBackend(*id, retire(backend)))
            });
        }
        // As it has fitted before.
        if let Ok(layout) = Layout::new(&self.config, self.datapath.maps.installed()) {
            self.reloads.order(Following::new(&self.config, &layout));
            self.adopt(layout);
            self.reconcile();
        }
        for address in gone {
            info!(backend = address, "gone with its last flow");
            self.events
                .note(EventKind::Flows, format!("{address}, which was removed, has no flow left"));
        }
    }
}

/// Finds the targets of the layout before. An index alone does not name one: a listener that comes may have
/// been given that of one that goes.
struct Before<'a>(HashMap<u32, (&'a Service, usize)>);

impl<'a> Before<'a> {
    fn new(layout: &'a Layout) -> Self {
        let services = layout.services.iter();
        let targets = services.flat_map(|service| {
            service.targets.clone().map(move |index| (layout.targets[index].id, (service, index)))
        });
        Self(targets.collect())
    }

    /// The index that a target of `service` had.
    fn find(&self, service: &Service, target: &Target) -> Option<usize> {
        let (was, index) = self.0.get(&target.id)?;
        was.endpoints.iter().any(|at| service.endpoints.contains(at)).then_some(*index)
    }
}

fn reply(answer: Option<Answer>, result: Result<Reloaded, Refusal>) {
    if let Some(answer) = answer {
        // Who asked may have gone away.
        let _ = answer.send(result);
    }
}
