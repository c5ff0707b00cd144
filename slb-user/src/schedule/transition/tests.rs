use proptest::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::{
    abi::{Scheduler, Seed},
    hash,
};

use super::*;

const HASH: Chooser = Chooser { scheduler: Scheduler::HASH, seed: Seed::PUBLIC };
const OTHER_HASH: Chooser = Chooser { scheduler: Scheduler::SOURCE, ..HASH };
const OTHER_SEED: Chooser = Chooser { seed: Seed::new([3, 5, 7, 11, 13]), ..HASH };
const IDLE: Duration = Duration::from_secs(100);

fn terms(connections: bool, now: Instant) -> Terms {
    Terms { connections, idle: IDLE, now }
}

fn flags(schedule: &Schedule) -> Vec<u32> {
    schedule.slots.iter().map(|slot| slot & !SLOT_BACKEND).collect()
}

fn owners(slots: &[u32]) -> Vec<u32> {
    slots.iter().map(|slot| slot & SLOT_BACKEND).collect()
}

const MOVING: u32 = SLOT_LOOK | SLOT_KEEP;

#[test]
fn given_connections_when_a_slot_changes_owner_then_it_goes_through_its_phases() {
    let start = Instant::now();
    let mut transition = Transition::new(HASH, vec![1, 1, 2]);
    transition.aim(HASH, &[1, 3, 2], |_| true, terms(true, start));
    let moving = transition.schedule(&FxHashSet::default());
    assert_eq!(owners(&moving.slots), [1, 3, 2]);
    assert_eq!(flags(&moving), [0, MOVING, 0]);
    assert_eq!(moving.previous, [1, 1, 2]);
    assert_eq!(transition.due(), Some(start + IDLE));

    // A further change: who came in between has an entry, and the others are still the first owner's.
    let later = start + IDLE / 2;
    transition.aim(HASH, &[1, 4, 2], |_| true, terms(true, later));
    let again = transition.schedule(&FxHashSet::default());
    assert_eq!((owners(&again.slots)[1], again.previous[1]), (4, 1));
    assert_eq!(transition.due(), Some(start + IDLE));

    transition.advance(terms(true, start + IDLE));
    let watched = transition.schedule(&FxHashSet::default());
    assert_eq!(flags(&watched), [0, SLOT_LOOK, 0]);
    assert_eq!(watched.previous, [0_u32; 0]);
    assert_eq!((transition.due(), transition.is_watched()), (None, true));

    transition.settle(&FxHashSet::from_iter([1]));
    assert!(!transition.is_settled(), "entries are left");
    transition.settle(&FxHashSet::default());
    assert_eq!(flags(&transition.schedule(&FxHashSet::default())), [0, 0, 0]);
    assert!(transition.is_settled() && !transition.is_watched());
}

#[test]
fn given_datagrams_when_a_slot_is_to_change_owner_then_it_is_observed_first() {
    let start = Instant::now();
    let mut transition = Transition::new(HASH, vec![1, 2]);
    transition.aim(HASH, &[3, 2], |_| true, terms(false, start));
    let observed = transition.schedule(&FxHashSet::default());
    assert_eq!((owners(&observed.slots), flags(&observed)), (vec![1, 2], vec![MOVING, 0]));
    assert_eq!(observed.previous, [0_u32; 0]);

    let over = terms(false, start + IDLE);
    transition.advance(over);
    transition.aim(HASH, &[3, 2], |_| true, over);
    let moved = transition.schedule(&FxHashSet::default());
    assert_eq!((owners(&moved.slots), flags(&moved)), (vec![3, 2], vec![SLOT_LOOK, 0]));
}

#[test]
fn given_datagrams_when_the_owner_takes_no_flows_then_it_is_replaced_at_once() {
    let now = terms(false, Instant::now());
    let mut transition = Transition::new(HASH, vec![1, 2]);
    transition.aim(HASH, &[3, 2], |owner| owner != 1, now);
    assert_eq!(transition.schedule(&FxHashSet::default()).slots, [3, 2]);
}

#[test]
fn given_slots_without_owner_when_they_get_an_owner_then_there_is_nothing_to_remember() {
    for connections in [true, false] {
        let mut transition = Transition::new(HASH, vec![NO_BACKEND; 2]);
        transition.aim(HASH, &[1, 2], |_| true, terms(connections, Instant::now()));
        assert_eq!(transition.schedule(&FxHashSet::default()).slots, [1, 2]);
    }
}

#[test]
fn given_shared_backends_when_published_then_their_slots_keep_entries() {
    let schedule = Transition::new(HASH, vec![1, 2]).schedule(&FxHashSet::from_iter([2]));
    assert_eq!(schedule.slots, [1, 2 | MOVING]);
}

/// The program's rules (`slb-ebpf/src/forward.rs`), for one listener.
#[derive(Default)]
struct Program {
    entries: FxHashMap<u64, u32>,
}

/// Where a flow is, of so many slots.
fn slot_of(by: Chooser, flow: u64, slots: &[u32]) -> usize {
    let seeded = flow.wrapping_mul(by.seed.words()[0]);
    let choice = match by.scheduler {
        Scheduler::SOURCE => (seeded as u32).wrapping_mul(0x9e37_79b1),
        _ => hash::choice(seeded),
    };
    hash::slot(choice, slots.len() as u32) as usize
}

impl Program {
    fn packet(&mut self, schedule: &Schedule, flow: u64, begins: bool) -> u32 {
        let at = |by, slots: &[u32]| slots[slot_of(by, flow, slots)];
        let slot = at(schedule.by, &schedule.slots);
        if slot & SLOT_LOOK == 0 {
            return slot & SLOT_BACKEND;
        }
        if let Some(&owner) = self.entries.get(&flow) {
            return owner;
        }
        let mut chosen = slot;
        if !begins && !schedule.previous.is_empty() {
            chosen = at(schedule.previous_by, &schedule.previous) | SLOT_KEEP;
        }
        if chosen & SLOT_KEEP != 0 {
            self.entries.insert(flow, chosen & SLOT_BACKEND);
        }
        chosen & SLOT_BACKEND
    }

    /// The agent's look through the table.
    fn sweep(&mut self, schedule: &Schedule, is_live: impl Fn(u64) -> bool) -> FxHashSet<usize> {
        let slot_of = |flow| slot_of(schedule.by, flow, &schedule.slots);
        self.entries.retain(|&flow, owner| {
            let slot = schedule.slots[slot_of(flow)];
            slot & SLOT_KEEP != 0 || is_live(flow) && slot & SLOT_BACKEND != *owner
        });
        self.entries.keys().map(|&flow| slot_of(flow)).collect()
    }
}

/// What happens next.
#[derive(Clone, Debug)]
enum Event {
    /// A schedule of another number is wanted; of another size, or by another hash.
    Aim(u32, bool, bool),
    /// Time passes, in hundredths of the idle timeout; every live flow sends at least that often.
    Wait(u32),
    /// A flow begins.
    Begin(u64),
    /// One of the flows ends.
    End(usize),
    /// The agent looks through the table.
    Sweep,
    /// The agent is restarted.
    Restart,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        2 => (any::<u32>(), prop::bool::weighted(0.1), prop::bool::weighted(0.1))
            .prop_map(|(seed, size, hash)| Event::Aim(seed, size, hash)),
        4 => (1..60_u32).prop_map(Event::Wait),
        6 => any::<u64>().prop_map(Event::Begin),
        2 => any::<usize>().prop_map(Event::End),
        2 => Just(Event::Sweep),
        1 => Just(Event::Restart),
    ];
    prop::collection::vec(event, 1..80)
}

fn wanted(seed: u32, size: usize) -> Vec<u32> {
    (0..size as u32).map(|slot| (slot.wrapping_mul(seed | 1) >> 7) % 5).collect()
}

proptest! {
    #[test]
    fn given_any_history_when_flows_go_on_then_none_changes_its_backend(
        history in events(),
        connections in any::<bool>(),
    ) {
        let mut now = Instant::now();
        let (mut size, mut by) = (13, HASH);
        let mut aim = wanted(1, size);
        let mut transition = Transition::new(HASH, aim.clone());
        let mut program = Program::default();
        let mut flows: FxHashMap<u64, u32> = FxHashMap::default();
        for event in history {
            match event {
                Event::Aim(seed, resize, rehash) => {
                    if rehash {
                        by = match by {
                            HASH => OTHER_HASH,
                            OTHER_HASH => OTHER_SEED,
                            _ => HASH,
                        };
                    }
                    // Datagrams of slots that are being observed do not stand another size.
                    if resize {
                        size = if size == 13 { 31 } else { 13 };
                    }
                    aim = wanted(seed, size);
                    transition.advance(terms(connections, now));
                    transition.aim(by, &aim, |_| true, terms(connections, now));
                }
                Event::Wait(time) => {
                    // In steps in which every live flow is heard of.
                    for _ in 0..time {
                        now += IDLE / 100;
                        transition.advance(terms(connections, now));
                        transition.aim(by, &aim, |_| true, terms(connections, now));
                        let schedule = transition.schedule(&FxHashSet::default());
                        for (&flow, &owner) in &flows {
                            prop_assert_eq!(program.packet(&schedule, flow, !connections), owner);
                        }
                    }
                }
                Event::Begin(flow) => {
                    flows.entry(flow).or_insert_with(|| {
                        let schedule = transition.schedule(&FxHashSet::default());
                        program.entries.remove(&flow);
                        program.packet(&schedule, flow, true)
                    });
                }
                Event::End(index) => {
                    if let Some(&flow) = flows.keys().nth(index % flows.len().max(1)) {
                        flows.remove(&flow);
                    }
                }
                Event::Sweep => {
                    let schedule = transition.schedule(&FxHashSet::default());
                    let pinned = program.sweep(&schedule, |flow| flows.contains_key(&flow));
                    transition.settle(&pinned);
                }
                Event::Restart => {
                    let schedule = transition.schedule(&FxHashSet::default());
                    transition = Transition::restored(&schedule, terms(connections, now));
                }
            }
            let schedule = transition.schedule(&FxHashSet::default());
            for (&flow, &owner) in &flows {
                prop_assert_eq!(program.packet(&schedule, flow, !connections), owner);
            }
        }

        // Left alone, it settles, and does what is wanted.
        for _ in 0..2 {
            now += IDLE;
            transition.advance(terms(connections, now));
            transition.aim(by, &aim, |_| true, terms(connections, now));
        }
        let schedule = transition.schedule(&FxHashSet::default());
        transition.settle(&program.sweep(&schedule, |_| false));
        prop_assert!(transition.is_settled());
        let settled = transition.schedule(&FxHashSet::default());
        prop_assert_eq!((settled.by, settled.slots), (by, aim));
    }
}
