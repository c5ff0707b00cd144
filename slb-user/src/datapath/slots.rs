//! Which chunks of `SLB_SLOTS` are free.
//!
//! A schedule is written to chunks that no listener refers to, and becomes visible when the
//! listener's record is swapped. The old chunks are left alone for a while: a packet that has read
//! the old record may still be on its way to them.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    time::{Duration, Instant},
};

/// An XDP program runs for microseconds; this is far beyond it.
pub(super) const GRACE: Duration = Duration::from_millis(100);

/// A first-fit allocator of ranges.
#[derive(Debug)]
pub(super) struct Chunks {
    /// Start → end.
    free: BTreeMap<u32, u32>,
    released: VecDeque<(Instant, Range<u32>)>,
}

impl Chunks {
    /// All of `capacity` is free.
    #[must_use]
    pub(super) fn new(capacity: u32) -> Self {
        Self { free: BTreeMap::from([(0, capacity)]), released: VecDeque::new() }
    }

    /// A range of `len` chunks, if there is one.
    pub(super) fn take(&mut self, len: u32, now: Instant) -> Option<Range<u32>> {
        while let Some((at, _)) = self.released.front()
            && now.duration_since(*at) >= GRACE
            && let Some((_, range)) = self.released.pop_front()
        {
            self.give(range);
        }
        let start = self.free.iter().find(|&(start, end)| end - start >= len).map(|(&s, _)| s)?;
        let range = start..start + len;
        self.reserve(range.clone());
        Some(range)
    }

    /// Takes a range that is known to be in use; what is not free of it stays as it is.
    pub(super) fn reserve(&mut self, range: Range<u32>) {
        let overlapping: Vec<(u32, u32)> = self
            .free
            .range(..range.end)
            .filter(|&(_, &end)| end > range.start)
            .map(|(&start, &end)| (start, end))
            .collect();
        for (start, end) in overlapping {
            self.free.remove(&start);
            if start < range.start {
                self.free.insert(start, range.start);
            }
            if range.end < end {
                self.free.insert(range.end, end);
            }
        }
    }

    /// No listener refers to the range any more.
    pub(super) fn release(&mut self, range: Range<u32>, now: Instant) {
        if !range.is_empty() {
            self.released.push_back((now, range));
        }
    }

    fn give(&mut self, range: Range<u32>) {
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&before, &before_end)) = self.free.range(..start).next_back()
            && before_end == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(after_end) = self.free.remove(&end) {
            end = after_end;
        }
        self.free.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn given_a_released_range_when_the_grace_is_over_then_it_is_taken_again() {
        let mut chunks = Chunks::new(10);
        let now = Instant::now();
        let all = chunks.take(10, now).unwrap();
        chunks.release(all.clone(), now);

        assert_eq!(chunks.take(1, now), None, "packets may still be there");
        assert_eq!(chunks.take(10, now + GRACE), Some(all));
    }

    proptest! {
        #[test]
        fn given_any_history_when_ranges_are_taken_then_none_overlap(
            lens in proptest::collection::vec((1_u32..20, any::<bool>()), 1..200),
        ) {
            let capacity = 64;
            let mut chunks = Chunks::new(capacity);
            let mut now = Instant::now();
            let mut held: Vec<Range<u32>> = Vec::new();
            for (len, release) in lens {
                now += GRACE;
                if release && !held.is_empty() {
                    let range = held.swap_remove(len as usize % held.len());
                    chunks.release(range, now);
                } else if let Some(range) = chunks.take(len, now) {
                    prop_assert_eq!(range.end - range.start, len);
                    prop_assert!(range.end <= capacity);
                    prop_assert!(held.iter().all(|h| h.end <= range.start || range.end <= h.start));
                    held.push(range);
                }
            }
            for range in held.drain(..) {
                chunks.release(range, now);
            }
            prop_assert_eq!(chunks.take(capacity, now + GRACE), Some(0..capacity), "all came back");
        }
    }
}
