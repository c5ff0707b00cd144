//! `SLB_FLOWS`, seen from the agent: looks through the entries, ends flows whose time is up, and removes entries that
//! say nothing.

use std::{
    mem::offset_of,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::{
    abi::{
        self, BUCKET_FLOWS, Bucket, ConnState, Endpoint, Flow, FlowKey, FlowKind, NO_PLACE,
        SLOT_BACKEND, SLOT_KEEP, Settings, TAG_FREE, TAG_LOCKED, TCP,
    },
    decide::{self, Rank, Standing},
    hash,
};

use super::{
    Pins, TableError,
    memory::{self, Memory},
};
use crate::state::Schedule;

/// The words of an entry.
const WORDS: usize = size_of::<Flow>() / size_of::<u32>();
const WORD: usize = size_of::<u32>();

/// The memory of the flow table, and of `SLB_ACTIVE`.
#[derive(Clone, Debug)]
pub struct FlowTable {
    flows: Arc<Memory<Bucket>>,
    active: Arc<Memory<u64>>,
}

/// Listeners some of whose slots may be settled, by where clients connect to: id and schedule.
pub type Watched = FxHashMap<Endpoint, (u32, Arc<Schedule>)>;

/// What a sweep of the table is for.
#[derive(Debug)]
pub struct SweepRequest {
    /// Whose entries may say nothing.
    pub watched: Watched,
    /// Backends that may have no flow left.
    pub leaving: FxHashSet<u32>,
    /// Backends whose flows are to end now.
    pub closed: FxHashSet<u32>,
    /// Where clients connect to; the listeners of other flows are gone.
    pub listeners: FxHashSet<Endpoint>,
    /// In jiffies: the present, as far as it is certain.
    pub now: u32,
    /// How long the end of a flow is remembered, in jiffies.
    pub closing: u32,
}

/// What a sweep has found.
#[derive(Debug, Default)]
pub struct SweepReport {
    /// The slots of watched listeners whose flows have entries that differ from them, by the listener's id.
    pub pinned: FxHashMap<u32, FxHashSet<usize>>,
    /// Backends of [`SweepRequest::leaving`] that have no flow left.
    pub left: FxHashSet<u32>,
    /// Places that hold an entry which is not over.
    pub occupied: u64,
    /// TCP connections that were ended: both sides are to be told.
    pub ended: Vec<Flow>,
}

/// So many connections are ended in one look: the next one takes the others.
const MOST_ENDED: usize = 65_536;

impl FlowTable {
    /// Opens the pinned table.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(pins: &Pins) -> Result<Self, TableError> {
        Ok(Self {
            flows: Arc::new(Memory::open(pins, "SLB_FLOWS")?),
            active: Arc::new(Memory::open(pins, "SLB_ACTIVE")?),
        })
    }

    /// How many flows of a backend have entries and have not ended.
    #[must_use]
    pub fn active(&self, backend: u32) -> u64 {
        let count = self.counter(backend).map_or(0, |count| count.load(Ordering::Relaxed));
        // Below 0 for the moment between two CPUs.
        u64::try_from(count as i64).unwrap_or(0)
    }

    /// How many of all backends have.
    #[must_use]
    pub fn active_flows(&self) -> u64 {
        let counts = self.counters().into_iter().map(|count| u64::try_from(count).unwrap_or(0));
        counts.sum()
    }

    /// Whether there is any, or a count that is off.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.counters().iter().any(|count| *count != 0)
    }

    fn counter(&self, backend: u32) -> Option<&AtomicU64> {
        let count = self.active.element(backend as usize)?;
        // SAFETY: a word of the mapping, which lives as long as `self` and is accessed by atomics only.
        Some(unsafe { AtomicU64::from_ptr(count.as_ptr()) })
    }

    fn counters(&self) -> Vec<i64> {
        let counters = (0..self.active.len() as u32).filter_map(|backend| self.counter(backend));
        counters.map(|count| count.load(Ordering::Relaxed) as i64).collect()
    }

    /// Reads the whole table: not for a task that must not wait.
    ///
    /// Ends the flows without packets for too long, and those of [`SweepRequest::closed`]; removes the entries of
    /// watched slots that say what the slot says as well, and records of direct flows that are over; and corrects the
    /// counts of active flows.
    #[must_use]
    pub fn sweep(&self, mut request: SweepRequest) -> SweepReport {
        let pinned = request.watched.values().map(|(id, _)| (*id, FxHashSet::default())).collect();
        let mut found = SweepReport { pinned, ..SweepReport::default() };
        let before = self.counters();
        let mut counted = vec![0_i64; before.len()];
        for words in self.entries() {
            let Some(flow) = read(words) else { continue };
            let is_over = abi::age(request.now, flow.expires) > 0;
            found.occupied += u64::from(!is_over);
            if !flow.is(FlowKind::Original) {
                // A direct flow's record, which the low half of the jiffies would make valid again one day.
                if flow.is(FlowKind::Bypass) && is_over {
                    self.free(words, &flow);
                }
                continue;
            }
            let state = flow.state();
            let has_ended = state.has_ended();
            let is_closed = !has_ended && request.closed.contains(&flow.backend);
            let is_out = is_over || is_closed;
            // A connection that was given up before it was established, or by its client, has no ends to be told.
            let is_in_use =
                state.is_active() && state.intersects(ConnState::ESTABLISHED | ConnState::AGED);
            let is_connection =
                !has_ended && u32::from(flow.proto) == TCP && (is_closed || is_in_use);
            let key = flow.key();
            let is_connection = is_connection && request.listeners.contains(&key.destination());
            if is_out && is_connection && found.ended.len() < MOST_ENDED {
                // It is still to be answered for.
                request.leaving.remove(&flow.backend);
                if self.end(words, &flow, &request) {
                    found.ended.push(flow);
                }
                continue;
            }
            if is_out && !is_connection {
                self.free(words, &flow);
                continue;
            }
            if !has_ended || state.intersects(ConnState::RST_PENDING) {
                request.leaving.remove(&flow.backend);
            }
            if has_ended {
                continue;
            }
            if let Some(count) = counted.get_mut(flow.backend as usize) {
                *count += i64::from(state.is_active());
            }
            let Some((id, schedule)) = request.watched.get(&key.destination()) else { continue };
            let slot = schedule.by.slot(&key, schedule.slots.len());
            if schedule.slots[slot] & SLOT_KEEP != 0 {
                continue;
            }
            let says_nothing = flow.peer == NO_PLACE
                && flow.port == flow.sport
                && flow.backend == schedule.slots[slot] & SLOT_BACKEND;
            if says_nothing {
                self.free(words, &flow);
            } else {
                found.pinned.entry(*id).or_default().insert(slot);
            }
        }
        self.correct(&before, &counted);
        found.left = request.leaving;
        found
    }

    /// Has a connection's packets answered with resets from now on; `false` if it is another's place by now.
    fn end(&self, words: &[AtomicU32; WORDS], flow: &Flow, request: &SweepRequest) -> bool {
        const STATE: usize = offset_of!(Flow, state);
        let taken =
            words[0].compare_exchange(flow.tag, TAG_LOCKED, Ordering::AcqRel, Ordering::Relaxed);
        if taken.is_err() {
            return false;
        }
        let mut bits = [0; WORD];
        bits[STATE % WORD] = ConnState::RST_PENDING.bits();
        words[STATE / WORD].fetch_or(u32::from_ne_bytes(bits), Ordering::Relaxed);
        let until = request.now.wrapping_add(request.closing);
        words[offset_of!(Flow, expires) / WORD].store(until, Ordering::Relaxed);
        words[0].store(flow.tag, Ordering::Release);
        self.count_off(flow);
        true
    }

    /// Makes a place free, unless another flow has taken it meanwhile.
    fn free(&self, words: &[AtomicU32; WORDS], flow: &Flow) {
        let is_freed = words[0]
            .compare_exchange(flow.tag, TAG_FREE, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
        if is_freed && flow.is(FlowKind::Original) {
            self.count_off(flow);
        }
    }

    /// Takes a flow from the count of active ones, if it was one.
    fn count_off(&self, flow: &Flow) {
        if flow.state().is_active()
            && let Some(count) = self.counter(flow.backend)
        {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Corrects what the program has counted wrong: two CPUs may end one flow at the same time. What began or
    /// ended during the look is no error, so only the part that was off before and after it is.
    fn correct(&self, before: &[i64], counted: &[i64]) {
        for (backend, (before, counted)) in before.iter().zip(counted).enumerate() {
            let Some(count) = self.counter(backend as u32) else { continue };
            let after = count.load(Ordering::Relaxed) as i64;
            let (first, last) = (before - counted, after - counted);
            if first.signum() == last.signum() && first != 0 {
                let error = if first.abs() < last.abs() { first } else { last };
                count.fetch_sub(error as u64, Ordering::Relaxed);
            }
        }
    }

    /// The entry of a packet, in a table with these settings.
    #[must_use]
    pub fn find(&self, key: &FlowKey, settings: &Settings) -> Option<Flow> {
        let tag = abi::tag(hash::flow(key, &settings.table_seed));
        let mut flows = self.bucket(key, settings)?.iter().filter_map(read);
        flows.find(|flow| flow.tag == tag && flow.is_of(key))
    }

    /// The entry at a place, if there is one.
    #[must_use]
    pub fn at(&self, place: u32) -> Option<Flow> {
        let words = self.flows.words(place as usize / BUCKET_FLOWS)?;
        let flows: &[[AtomicU32; WORDS]] = words.as_chunks().0;
        flows.get(place as usize % BUCKET_FLOWS).and_then(read)
    }

    /// Whether no place that an entry could have is free, or gives way to it.
    #[must_use]
    pub fn is_full(&self, key: &FlowKey, settings: &Settings, now: u32) -> bool {
        let Some(bucket) = self.bucket(key, settings) else { return true };
        bucket.iter().all(|words| match words[0].load(Ordering::Acquire) {
            TAG_FREE => false,
            TAG_LOCKED => true,
            _ => read(words)
                .is_some_and(|flow| decide::rank(now, &Standing::from(&flow)) == Rank::STAYS),
        })
    }

    fn bucket(&self, key: &FlowKey, settings: &Settings) -> Option<&[[AtomicU32; WORDS]]> {
        let bucket = hash::bucket(key, &settings.table_seed, settings.buckets);
        let words = self.flows.words(bucket as usize)?;
        Some(words.as_chunks().0)
    }

    /// Every entry of a client's packets whose flow is active.
    pub fn flows(&self) -> impl Iterator<Item = Flow> {
        let flows = self.entries().filter_map(read);
        flows.filter(|flow| flow.is(FlowKind::Original) && flow.state().is_active())
    }

    fn entries(&self) -> impl Iterator<Item = &[AtomicU32; WORDS]> {
        let buckets = (0..self.flows.len()).filter_map(|index| self.flows.words(index));
        buckets.flat_map(|words| words.as_chunks().0)
    }
}

/// An entry, if there is one that is not just being written.
fn read(words: &[AtomicU32; WORDS]) -> Option<Flow> {
    // The tag is its first word, and guards the others.
    let tag = words[0].load(Ordering::Acquire);
    if tag <= TAG_LOCKED {
        return None;
    }
    let flow = memory::load(words);
    fence(Ordering::Acquire);
    (words[0].load(Ordering::Relaxed) == tag).then_some(flow)
}
