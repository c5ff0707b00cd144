//! `SLB_FLOWS`, seen from the agent: looks through the entries, and removes those that say nothing.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use slb_common::{
    abi::{
        self, BUCKET_FLOWS, Bucket, Endpoint, FLOW_FORWARD, Flow, NO_PLACE, SLOT_BACKEND,
        SLOT_KEEP, TAG_FREE, TAG_TAKEN,
    },
    hash,
};

use super::{Pins, TableError, memory::Memory};
use crate::state::Schedule;

/// The words of an entry.
const WORDS: usize = size_of::<Flow>() / size_of::<u32>();

/// The flow table's memory.
#[derive(Clone, Debug)]
pub struct FlowTable(Arc<Memory<Bucket>>);

/// Listeners some of whose slots may be settled, by where clients connect to: id and schedule.
pub type Watched = HashMap<Endpoint, (u32, Arc<Schedule>)>;

impl FlowTable {
    /// Opens the pinned table.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(pins: &Pins) -> Result<Self, TableError> {
        Memory::open(pins, "SLB_FLOWS").map(Arc::new).map(Self)
    }

    /// Removes the entries of watched slots that are over, or say what the slot says as well. Gives
    /// the slots of each listener that have others, by its id; and those of the backends `leaving` of which
    /// no flow is left.
    ///
    /// Reads the whole table: not for a task that must not wait. `now` is in jiffies.
    #[must_use]
    pub fn sweep(
        &self,
        watched: &Watched,
        mut leaving: HashSet<u32>,
        now: u32,
    ) -> (HashMap<u32, HashSet<usize>>, HashSet<u32>) {
        let mut pinned: HashMap<u32, HashSet<usize>> =
            watched.values().map(|(id, _)| (*id, HashSet::new())).collect();
        for words in self.entries() {
            let Some(flow) = read(words).filter(|flow| flow.kind == FLOW_FORWARD) else { continue };
            let is_over = abi::age(now, flow.expires) > 0;
            if !is_over && !abi::has_ended(flow.state) {
                leaving.remove(&flow.backend);
            }
            let key = flow.key();
            let Some((id, schedule)) = watched.get(&key.destination()) else { continue };
            let choice = hash::choice_by(schedule.scheduler, &key, hash::flow(&key));
            let slot = hash::slot(choice, schedule.slots.len() as u32) as usize;
            if schedule.slots[slot] & SLOT_KEEP != 0 {
                continue;
            }
            let says_nothing = flow.peer == NO_PLACE
                && flow.port == flow.sport
                && flow.backend == schedule.slots[slot] & SLOT_BACKEND;
            if says_nothing || is_over {
                // Somebody else may have taken the place meanwhile.
                let _ = words[0].compare_exchange(
                    flow.tag,
                    TAG_FREE,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
            } else {
                pinned.entry(*id).or_default().insert(slot);
            }
        }
        (pinned, leaving)
    }

    fn entries(&self) -> impl Iterator<Item = &[AtomicU32; WORDS]> {
        (0..self.0.len()).filter_map(|index| self.0.element(index)).flat_map(|bucket| {
            // SAFETY: the mapping lives as long as `self`, and its words are accessed by atomics only.
            let flows = unsafe { bucket.cast::<[[AtomicU32; WORDS]; BUCKET_FLOWS]>().as_ref() };
            flows.iter()
        })
    }
}

/// An entry, if there is one.
fn read(words: &[AtomicU32; WORDS]) -> Option<Flow> {
    // The tag is its first word.
    if words[0].load(Ordering::Acquire) <= TAG_TAKEN {
        return None;
    }
    let words: [u32; WORDS] = std::array::from_fn(|word| words[word].load(Ordering::Relaxed));
    // SAFETY: as many bytes, and any are a valid entry.
    Some(unsafe { std::mem::transmute::<[u32; WORDS], Flow>(words) })
}
