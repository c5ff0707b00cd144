//! The schedule of each listener, and how it moves from the slots it has to those it should have.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{self, NO_BACKEND, SLOT_BACKEND};

use super::Inputs;
use crate::{
    config::Scheduler,
    health::Health,
    ids::{Ids, IndexedBackend, IndexedListener, Role},
    parallel,
    schedule::{
        Member, maglev, ring,
        transition::{Terms, Transition},
    },
    state::{Chooser, Schedule},
};

/// Slots of a round-robin schedule at most: any weights of 655 backends exactly.
const RING_LIMIT: usize = 65_536;

/// How long a schedule without flows waits for the first probes: what is assigned before the last of
/// them would have to move again.
pub(super) const FIRST_PROBES: Duration = Duration::from_secs(1);

/// All schedules.
///
/// They are remembered because a table of a thousand backends takes milliseconds and a change concerns few of
/// them, and because the slots of before decide how a schedule changes.
#[derive(Debug, Default)]
pub(super) struct Schedules {
    /// By [`IndexedListener::id`].
    pub(super) states: FxHashMap<u32, ScheduleState>,
    /// Services that wait for first probes, and until when.
    waiting: FxHashMap<u32, Instant>,
    /// Listeners of which slots were settled since their schedule was last asked for.
    settled: FxHashSet<u32>,
}

/// The schedule of a listener, and what it was made from.
#[derive(Debug)]
pub(super) struct ScheduleState {
    by: Chooser,
    members: Vec<Member>,
    /// How many backends the configuration names, usable or not.
    named: usize,
    /// Backends whose flows have entries in any case.
    with_entries: FxHashSet<u32>,
    wanted: Vec<u32>,
    progress: Progress,
    published: Arc<Schedule>,
}

/// How far the change to the wanted slots has come.
#[derive(Debug)]
enum Progress {
    /// Slot by slot.
    Hash(Transition),
    /// At once, because every flow has an entry, except for those of a schedule by hash before it:
    /// connections without an entry go by that until then.
    Ring { previous_by: Chooser, previous: Vec<u32>, until: Instant },
}

/// The backends of a listener that a schedule is made for.
pub(super) struct Candidates<'a> {
    pub listener: &'a IndexedListener,
    /// All of the listener.
    pub backends: &'a [IndexedBackend],
    /// One per backend: whether it may get new flows.
    pub usable: Vec<bool>,
    /// Backends, by index, whose flows have entries in any case.
    pub with_entries: FxHashSet<u32>,
}

impl Schedules {
    /// Forgets the schedules of listeners that are not in `ids`.
    pub(super) fn keep(&mut self, ids: &Ids) {
        let ids: FxHashSet<u32> = ids.listeners.iter().map(|listener| listener.id).collect();
        self.states.retain(|id, _| ids.contains(id));
        self.waiting.retain(|id, _| ids.contains(id));
        self.settled.retain(|id| ids.contains(id));
    }

    /// Whether the schedule of a listener may be another by now although its candidates are the same.
    pub(super) fn is_outdated(&self, id: u32, now: Instant) -> bool {
        self.waiting.contains_key(&id)
            || self.settled.contains(&id)
            || self.states.get(&id).is_none_or(|state| state.is_due(now))
    }

    /// The backends that get new flows of a listener, in the order of its backends.
    pub(super) fn members(&self, id: u32) -> &[Member] {
        self.states.get(&id).map_or(&[], |state| &state.members)
    }

    /// When a schedule changes without an event from outside.
    pub(super) fn due(&self) -> Option<Instant> {
        let states = self.states.values().filter_map(ScheduleState::due);
        states.chain(self.waiting.values().copied()).min()
    }

    /// Whether a listener gets no backends yet because their first probes have not ended.
    pub(super) fn waits(
        &mut self,
        listener: &IndexedListener,
        backends: &[IndexedBackend],
        health: &[Health],
        inputs: &Inputs<'_>,
    ) -> bool {
        let is_new = !self.states.contains_key(&listener.id)
            && !listener.endpoints.iter().any(|at| inputs.installed.listeners.contains_key(at));
        if is_new && scheduler(listener, backends).is_by_hash() {
            self.waiting.insert(listener.id, inputs.now + FIRST_PROBES);
        }
        let Some(until) = self.waiting.get(&listener.id) else { return false };
        let is_out = |(backend, health): (&IndexedBackend, &Health)| {
            backend.check.is_some() && *health == Health::Unknown
        };
        // A primary is taken for healthy until its probes say otherwise.
        let has_primary = backends.iter().any(|backend| backend.role == Role::Primary);
        let waits = !has_primary && *until > inputs.now && backends.iter().zip(health).any(is_out);
        if !waits {
            self.waiting.remove(&listener.id);
        }
        waits
    }

    /// The schedules some of whose slots a look at the flow table may settle, by the listener's id.
    pub(super) fn watched(&self) -> FxHashMap<u32, Arc<Schedule>> {
        let is_watched = |state: &&ScheduleState| match &state.progress {
            Progress::Hash(transition) => transition.is_watched(),
            Progress::Ring { .. } => false,
        };
        let watched = self.states.iter().filter(|(_, state)| is_watched(state));
        watched.map(|(&id, state)| (id, Arc::clone(&state.published))).collect()
    }

    /// Settles the slots of `schedule` whose flows have no entries: all but those in `pinned`.
    pub(super) fn settle(&mut self, id: u32, schedule: &Arc<Schedule>, pinned: &FxHashSet<usize>) {
        let Some(state) = self.states.get_mut(&id) else { return };
        // Another one by now: the look was in vain.
        if !Arc::ptr_eq(&state.published, schedule) {
            return;
        }
        if let Progress::Hash(transition) = &mut state.progress {
            transition.settle(pinned);
            self.settled.insert(id);
            let published = transition.schedule(&state.with_entries);
            // The same pointer as in the maps, if nothing was settled.
            if *state.published != published {
                state.published = Arc::new(published);
            }
        }
    }

    /// Whether flows of the listener may have entries that want to know of SYN, FIN and RST.
    pub(super) fn is_tracked(&self, id: u32) -> bool {
        self.states.get(&id).is_some_and(|state| match &state.progress {
            Progress::Hash(transition) => !transition.is_settled(),
            Progress::Ring { .. } => true,
        })
    }

    /// Brings the schedules of listeners in line with their candidates, and gives them.
    pub(super) fn update(
        &mut self,
        candidates: Vec<Candidates<'_>>,
        inputs: &Inputs<'_>,
    ) -> Vec<Arc<Schedule>> {
        let candidates = candidates.into_iter();
        let steps = candidates.map(|it| (self.states.remove(&it.listener.id), it)).collect();
        // After a start, there are thousands of tables to compute.
        let states = parallel::map(steps, |(before, candidates)| {
            (candidates.listener.id, ScheduleState::next(before, &candidates, inputs))
        });
        let schedules = states.into_iter().map(|(id, state)| {
            let published = Arc::clone(&state.published);
            self.settled.remove(&id);
            self.states.insert(id, state);
            published
        });
        schedules.collect()
    }
}

impl Candidates<'_> {
    fn usable(&self) -> impl Iterator<Item = &IndexedBackend> {
        self.backends
            .iter()
            .zip(&self.usable)
            .filter_map(|(backend, usable)| usable.then_some(backend))
    }

    /// Who gets new flows: the primary alone, if it is usable.
    fn members(&self) -> Vec<Member> {
        let member = |backend: &IndexedBackend| Member {
            id: backend.id,
            identity: backend.identity,
            weight: match self.listener.scheduler {
                Scheduler::Rr | Scheduler::Wlc => backend.weight.min(1),
                _ => backend.weight,
            },
        };
        let is_primary =
            |backend: &&IndexedBackend| backend.role == Role::Primary && backend.weight > 0;
        match self.usable().find(is_primary) {
            Some(primary) => vec![member(primary)],
            None => self.usable().map(member).collect(),
        }
    }
}

/// The next step from the schedule `before`, or from the one in the maps, to the wanted slots.
fn progress(
    before: Option<ScheduleState>,
    (by, wanted): (Chooser, &[u32]),
    candidates: &Candidates<'_>,
    inputs: &Inputs<'_>,
) -> Progress {
    let listener = candidates.listener;
    let terms = Terms {
        connections: listener.endpoints[0].proto == abi::TCP,
        idle: listener.idle_timeout,
        now: inputs.now,
    };
    let lost_entries: FxHashSet<u32> = before
        .iter()
        .flat_map(|before| before.with_entries.difference(&candidates.with_entries).copied())
        .collect();
    let from = before.map(|before| before.progress).or_else(|| {
        let installed = listener.endpoints.iter();
        let mut installed = installed.filter_map(|at| inputs.installed.listeners.get(at));
        let installed = installed.find(|installed| installed.id == listener.id)?;
        Some(Progress::restored(&installed.schedule, terms))
    });
    if !by.scheduler.is_by_hash() {
        return Progress::ring(from, by, terms);
    }
    let is_usable = |id| candidates.usable().any(|backend| backend.id == id);
    Progress::hash(from, (by, wanted), is_usable, &lost_entries, terms)
}

/// A schedule by the same pointer as in the maps, if it is the one there: two pointers are compared faster
/// than two schedules.
fn shared_with_maps(
    listener: &IndexedListener,
    schedule: Schedule,
    inputs: &Inputs<'_>,
) -> Arc<Schedule> {
    let mut installed =
        listener.endpoints.iter().filter_map(|at| inputs.installed.listeners.get(at));
    match installed.find(|installed| *installed.schedule == schedule) {
        Some(known) => Arc::clone(&known.schedule),
        None => Arc::new(schedule),
    }
}

impl ScheduleState {
    /// The state after `before`, or the first one, for these candidates.
    fn next(before: Option<Self>, candidates: &Candidates<'_>, inputs: &Inputs<'_>) -> Self {
        let Candidates { listener, backends, with_entries, .. } = candidates;
        let members = candidates.members();
        let by = Chooser { scheduler: scheduler(listener, backends), seed: inputs.seed };
        let is_same = before.as_ref().is_some_and(|before| {
            before.by == by
                && before.members == members
                && before.named == named(backends)
                && before.with_entries == *with_entries
        });
        let before = match before {
            Some(before) if is_same && !before.is_due(inputs.now) => return before,
            before => before,
        };
        let wanted = match &before {
            Some(before) if is_same => before.wanted.clone(),
            _ => wanted(listener, backends, &members),
        };
        let progress = progress(before, (by, &wanted), candidates, inputs);
        let published = progress.schedule((by, &wanted), with_entries);
        Self {
            by,
            members,
            named: named(backends),
            with_entries: with_entries.clone(),
            wanted,
            progress,
            published: shared_with_maps(listener, published, inputs),
        }
    }

    /// When it changes without an event from outside.
    fn due(&self) -> Option<Instant> {
        match &self.progress {
            Progress::Hash(transition) => transition.due(),
            Progress::Ring { previous, until, .. } => (!previous.is_empty()).then_some(*until),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.due().is_some_and(|due| due <= now)
    }
}

impl Progress {
    /// As an earlier agent has left it.
    fn restored(schedule: &Schedule, terms: Terms) -> Self {
        if schedule.by.scheduler.is_by_hash() {
            return Self::Hash(Transition::restored(schedule, terms));
        }
        let previous = schedule.previous.iter().map(|slot| slot & SLOT_BACKEND).collect();
        let previous_by = schedule.previous_by;
        Self::Ring { previous_by, previous, until: terms.now + terms.idle }
    }

    fn hash(
        from: Option<Self>,
        (by, wanted): (Chooser, &[u32]),
        is_usable: impl Fn(u32) -> bool,
        lost_entries: &FxHashSet<u32>,
        terms: Terms,
    ) -> Self {
        let mut transition = match from {
            None => Transition::new(by, wanted.to_vec()),
            Some(Self::Hash(transition)) => transition,
            Some(Self::Ring { .. }) => Transition::watched(by, wanted.to_vec()),
        };
        transition.watch(lost_entries);
        transition.advance(terms);
        transition.aim(by, wanted, is_usable, terms);
        Self::Hash(transition)
    }

    fn ring(from: Option<Self>, by: Chooser, terms: Terms) -> Self {
        match from {
            Some(ring @ Self::Ring { until, .. }) if until > terms.now => ring,
            Some(Self::Hash(transition)) => Self::Ring {
                previous_by: transition.by(),
                previous: transition.owners().to_vec(),
                until: terms.now + terms.idle,
            },
            _ => Self::Ring {
                previous_by: Chooser { scheduler: abi::Scheduler::HASH, ..by },
                previous: Vec::new(),
                until: terms.now,
            },
        }
    }

    fn schedule(&self, (by, wanted): (Chooser, &[u32]), with_entries: &FxHashSet<u32>) -> Schedule {
        match self {
            Self::Hash(transition) => transition.schedule(with_entries),
            Self::Ring { previous_by, previous, .. } => Schedule {
                by,
                previous_by: *previous_by,
                slots: wanted.to_vec(),
                previous: previous.clone(),
            },
        }
    }
}

/// How many backends the configuration names.
fn named(backends: &[IndexedBackend]) -> usize {
    backends.iter().filter(|backend| !backend.is_orphaned()).count()
}

/// Whether one backend gets all new flows.
fn is_single(backends: &[IndexedBackend]) -> bool {
    named(backends) == 1 || backends.iter().any(|backend| backend.role == Role::Primary)
}

/// What chooses among the slots. Datagrams of a pair do not go by hash: they would stay with the
/// secondary for an idle timeout after the primary has come back.
fn scheduler(listener: &IndexedListener, backends: &[IndexedBackend]) -> abi::Scheduler {
    let is_pair = backends.iter().any(|backend| backend.role == Role::Primary);
    match listener.scheduler {
        _ if is_pair && listener.endpoints[0].proto == abi::UDP => abi::Scheduler::RING,
        Scheduler::Tch => abi::Scheduler::HASH,
        Scheduler::Sch => abi::Scheduler::SOURCE,
        Scheduler::Wrr | Scheduler::Rr => abi::Scheduler::RING,
        Scheduler::Wlc => abi::Scheduler::LEAST,
        Scheduler::Qch => abi::Scheduler::QUIC,
    }
}

/// Who is to get new flows, slot by slot.
fn wanted(listener: &IndexedListener, backends: &[IndexedBackend], members: &[Member]) -> Vec<u32> {
    if is_single(backends) {
        // Nothing to choose.
        let only = members.iter().find(|member| member.weight > 0);
        return vec![only.map_or(NO_BACKEND, |member| member.id)];
    }
    match listener.scheduler {
        Scheduler::Tch | Scheduler::Sch | Scheduler::Qch => {
            // As large for the healthy ones as for all, so that a failure moves as little as it can.
            let size = maglev::size_for(named(backends));
            let table = maglev::table(members, size);
            if table.is_empty() { vec![NO_BACKEND; size] } else { table }
        }
        Scheduler::Wrr | Scheduler::Rr | Scheduler::Wlc => ring::ring(members, RING_LIMIT),
    }
}
