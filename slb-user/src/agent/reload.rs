//! Another configuration for a running agent.
//!
//! A file is read in a thread of its own; then the follower asks the kernel about what is new in it; then
//! everything is swapped at once. Until then nothing has changed, and whatever is wrong leaves it so.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    error::Error,
    io, mem,
    path::Path,
    time::Instant,
};

use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::{
    Agent, SWEEP_SLACK,
    follow::{Following, Surroundings},
    known::{Known, Parsed},
    staged::Staged,
};
use crate::{
    api::{Refusal, Reloaded},
    causes::causes,
    config::{Config, Edit, Mistake, changes},
    health::Health,
    layout::Layout,
    plan::{Step, retire},
};

/// Who asked for a reload, and waits for how it ends.
pub(super) type Answer = oneshot::Sender<Result<Reloaded, Refusal>>;

/// A file that was read.
pub(super) struct Read {
    result: Result<Parsed, Refusal>,
    /// What it is to be replaced by, if that is what was read.
    staged: Option<Staged>,
    answer: Option<Answer>,
}

/// A configuration that the follower is looking around for.
struct Pending {
    config: Config,
    layout: Layout,
    warnings: Vec<Mistake>,
    staged: Option<Staged>,
    answer: Option<Answer>,
}

/// What somebody asks for.
enum Wish {
    Reload(Option<Answer>),
    Edit(Edit, Answer),
}

/// How far reloads are.
pub(super) struct Reloads {
    files: mpsc::Sender<Read>,
    orders: mpsc::UnboundedSender<Following>,
    pending: Option<Pending>,
    /// Whether one is under way.
    is_busy: bool,
    /// Who asked meanwhile.
    waiting: VecDeque<Wish>,
    /// What the follower was told last.
    following: Following,
    known: Known,
    /// Counts configurations; the first is 1.
    pub generation: u64,
    /// How many were refused.
    pub failures: u64,
    /// Why the last one was refused, until one is not.
    pub refused: Option<String>,
}

impl Reloads {
    pub fn new(
        files: mpsc::Sender<Read>,
        orders: mpsc::UnboundedSender<Following>,
        following: Following,
    ) -> Self {
        Self {
            files,
            orders,
            pending: None,
            is_busy: false,
            waiting: VecDeque::new(),
            following,
            known: Known::default(),
            generation: 1,
            failures: 0,
            refused: None,
        }
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
        let (path, known) = (self.path.clone(), self.reloads.known.clone());
        // What is wrong with it by now, whoever edits it is told.
        tokio::task::spawn_blocking(move || drop(known.read(&path)));
    }

    /// Reads the file again, and goes by it.
    pub(super) fn reload(&mut self, answer: Option<Answer>) {
        self.begin(Wish::Reload(answer));
    }

    /// Changes the file, and goes by it.
    pub(super) fn edit(&mut self, edit: Edit, answer: Answer) {
        self.begin(Wish::Edit(edit, answer));
    }

    /// One at a time: two edits of the same text would undo each other.
    fn begin(&mut self, wish: Wish) {
        if self.reloads.is_busy {
            self.reloads.waiting.push_back(wish);
            return;
        }
        self.reloads.is_busy = true;
        let (path, files) = (self.path.clone(), self.reloads.files.clone());
        let known = self.reloads.known.clone();
        tokio::task::spawn_blocking(move || {
            let read = match wish {
                Wish::Reload(answer) => Read { result: known.read(&path), staged: None, answer },
                Wish::Edit(edit, answer) => {
                    let (result, staged) = match known.edited(&path, &edit) {
                        Ok((read, staged)) => (Ok(read), staged),
                        Err(refusal) => (Err(refusal), None),
                    };
                    Read { result, staged, answer: Some(answer) }
                }
            };
            // Nobody takes it any more: then the agent is ending.
            let _ = files.blocking_send(read);
        });
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
    pub(super) fn consider(&mut self, Read { result, staged, answer }: Read) {
        let (config, warnings) = match result {
            Ok(read) => read,
            Err(refusal) => return self.refuse(answer, refusal),
        };
        if config == self.config {
            if let Err(refusal) = self.write(staged) {
                return self.refuse(answer, refusal);
            }
            self.reloads.refused = None;
            info!("reloaded; the configuration is what it was");
            return self.done(answer, Vec::new(), &warnings);
        }
        match self.prepare(&config) {
            Err(refusal) => self.refuse(answer, refusal),
            Ok(layout) => {
                let following = Following::new(&config, &layout);
                let is_alike = following.is_like(&self.reloads.following)
                    && config.gateway.xdp_mode == self.config.gateway.xdp_mode;
                self.reloads.pending = Some(Pending { config, layout, warnings, staged, answer });
                if is_alike {
                    // Nothing that the kernel would have to be asked about.
                    return self.swap(None);
                }
                self.reloads.order(following);
            }
        }
    }

    /// Whether the running agent can go by a configuration.
    fn prepare(&self, config: &Config) -> Result<Layout, Refusal> {
        let (was, is) = (&self.config.gateway, &config.gateway);
        for (key, was, is) in [("api", &was.api, &is.api), ("pins", &was.pins, &is.pins)] {
            if was != is {
                return Err(Refusal::Conflict(format!(
                    "{}: gateway.{key} cannot change while the agent runs: write {:?} again, or \
                     restart the agent",
                    self.path.display(),
                    was.display(),
                )));
            }
        }
        let layout = Layout::new(config, self.datapath.maps.installed());
        let layout = layout.map_err(|error| Refusal::Conflict(error.to_string()))?;
        let (needed, there) = (super::chunks(config), self.datapath.maps.chunks());
        // For the schedules before, and to write new ones beside the old.
        if 3 * needed > there {
            return Err(Refusal::Conflict(format!(
                "the schedules take {needed} chunks of SLB_SLOTS, which has {there} and needs three \
                 times as many; run `slb unload` and start the agent again to make it larger"
            )));
        }
        Ok(layout)
    }

    /// Whether these are the surroundings that the pending configuration waits for.
    pub(super) fn awaits(&self, surroundings: &Surroundings) -> bool {
        self.reloads.pending.is_some() && surroundings.number == self.reloads.following.number
    }

    /// Goes by the pending configuration, whose surroundings these are, if they are others than before.
    pub(super) fn swap(&mut self, surroundings: Option<Surroundings>) {
        let Some(Pending { config, layout, warnings, staged, answer }) =
            self.reloads.pending.take()
        else {
            return;
        };
        let before =
            surroundings.map(|surroundings| mem::replace(&mut self.surroundings, surroundings));
        let mut interfaces = config.gateway.interfaces.iter();
        let is_possible = interfaces
            .try_for_each(|name| self.check_interface(name))
            .map_err(|error| Refusal::Conflict(causes(&error)))
            .and_then(|()| self.write(staged));
        if let Err(refusal) = is_possible {
            if let Some(before) = before {
                self.surroundings = before;
                self.reloads.order(Following::new(&self.config, &self.layout));
            }
            return self.refuse(answer, refusal);
        }
        let changes = changes(&self.config, &config);
        let was = mem::replace(&mut self.config, config);
        self.adopt(layout);
        let (was, is) = (was.gateway, &self.config.gateway);
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
            is_done &= self.go_on("XDP", Self::attach);
            is_done &= self.go_on("XDP elsewhere", |agent| {
                agent.datapath.detach_others(&agent.config.gateway.interfaces)
            });
            // In which mode, nobody knew before.
            is_done &= self.set_and_reconcile();
        }
        if moves || before.is_some() && self.surroundings.outdates_clients {
            is_done &= self.go_on("route epoch", |agent| agent.datapath.maps.next_route_epoch());
        }
        self.serve_metrics();
        for change in &changes {
            info!(generation = self.reloads.generation, "{change}");
            self.events.note("config", format!("generation {}: {change}", self.reloads.generation));
        }
        if is_done {
            self.done(answer, changes, &warnings);
        } else {
            let failures: Vec<_> = self.failures.texts().collect();
            let text = format!("done in part, and tried again: {}", failures.join("; "));
            reply(answer, Err(Refusal::Failed(text)));
            self.next();
        }
    }

    /// Replaces the file, if that was asked for.
    fn write(&self, staged: Option<Staged>) -> Result<(), Refusal> {
        let written = staged.map_or(Ok(()), Staged::commit);
        written.map_err(|error| unwritable(&self.path, &error))
    }

    fn set_and_reconcile(&mut self) -> bool {
        self.go_on("settings", Self::set) & self.reconcile()
    }

    /// Does something that is tried again if it fails, and says whether it did not.
    fn go_on<E: Error + 'static>(
        &mut self,
        what: &'static str,
        attempt: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> bool {
        let result = attempt(self);
        let is_done = result.is_ok();
        self.failures.note(what, result);
        is_done
    }

    fn done(&mut self, answer: Option<Answer>, changes: Vec<String>, warnings: &[Mistake]) {
        let warnings: Vec<String> = warnings.iter().map(ToString::to_string).collect();
        for warning in &warnings {
            warn!("{warning}");
        }
        let generation = self.reloads.generation;
        reply(answer, Ok(Reloaded { generation, changes, warnings }));
        self.next();
    }

    fn refuse(&mut self, answer: Option<Answer>, refusal: Refusal) {
        warn!("reload refused, nothing was changed:\n{refusal}");
        self.events.note("config", format!("reload refused: {refusal}"));
        self.reloads.failures += 1;
        self.reloads.refused = Some(format!("the last reload was refused: {refusal}"));
        reply(answer, Err(refusal));
        self.next();
    }

    /// Whoever has waited is next.
    fn next(&mut self) {
        self.reloads.is_busy = false;
        if let Some(wish) = self.reloads.waiting.pop_front() {
            self.begin(wish);
        }
    }

    /// Another layout; what is known of a target goes with its index.
    pub(super) fn adopt(&mut self, layout: Layout) {
        let known: HashMap<u32, Health> =
            self.layout.targets.iter().map(|target| target.id).zip(self.health.clone()).collect();
        let installed = self.datapath.maps.installed();
        let mut health = super::restored(&layout, installed);
        for (target, health) in layout.targets.iter().zip(&mut health) {
            if let Some(&known) = known.get(&target.id) {
                *health = known;
            }
        }
        self.health = health;
        let ids: HashSet<u32> = layout.targets.iter().map(|target| target.id).collect();
        self.transitions.retain(|id, _| ids.contains(id));
        self.planner.keep(&layout);
        self.layout = layout;
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
        if self.reloads.is_busy {
            return;
        }
        // One may have come and gone again since that look.
        let over: Vec<u32> = self.leaving().intersection(left).copied().collect();
        if over.is_empty() {
            return;
        }
        for id in &over {
            let Some(&backend) = self.datapath.maps.installed().backends.get(id) else { continue };
            let address = self.layout.targets.iter().find(|target| target.id == *id);
            let address = address.map(|target| target.addr.to_string()).unwrap_or_default();
            info!(backend = address, "gone with its last flow");
            self.events.note("flows", format!("{address}, which was removed, has no flow left"));
            self.go_on("maps", |agent| {
                agent.datapath.maps.apply(Step::PutBackend(*id, retire(backend)))
            });
        }
        // As it has fitted before.
        if let Ok(layout) = Layout::new(&self.config, self.datapath.maps.installed()) {
            self.reloads.order(Following::new(&self.config, &layout));
            self.adopt(layout);
            self.reconcile();
        }
    }
}

pub(super) fn unwritable(path: &Path, error: &io::Error) -> Refusal {
    let hint = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "; under systemd, its folder has to be in the unit's ReadWritePaths="
        }
        io::ErrorKind::PermissionDenied => "; its folder has to belong to the agent's user",
        _ => "",
    };
    Refusal::Conflict(format!("cannot write {}: {error}{hint}", path.display()))
}

fn reply(answer: Option<Answer>, result: Result<Reloaded, Refusal>) {
    if let Some(answer) = answer {
        // Who asked may have gone away.
        let _ = answer.send(result);
    }
}
