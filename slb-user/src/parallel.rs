//! Computations on all CPUs.

use std::{num::NonZero, panic, thread};

/// Items that are worth a thread.
const LEAST: usize = 64;

/// What `compute` makes of each item, in their order.
pub(crate) fn map<T: Send, R: Send>(mut items: Vec<T>, compute: impl Fn(T) -> R + Sync) -> Vec<R> {
    if items.len() < 2 * LEAST {
        return items.into_iter().map(compute).collect();
    }
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let each = items.len().div_ceil(threads).max(LEAST);
    let compute = &compute;
    thread::scope(|scope| {
        let mut others = Vec::new();
        while items.len() > each {
            let part = items.split_off(items.len() - each);
            let work = move || part.into_iter().map(compute).collect::<Vec<R>>();
            others.push(scope.spawn(work));
        }
        let mut results: Vec<R> = items.into_iter().map(compute).collect();
        for other in others.into_iter().rev() {
            results.extend(other.join().unwrap_or_else(|panic| panic::resume_unwind(panic)));
        }
        results
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn given_any_number_of_items_when_mapped_then_results_are_in_their_order() {
        for count in [0, 1, 127, 128, 129, 1_000] {
            let expected: Vec<usize> = (0..count).map(|item| 2 * item).collect();
            assert_eq!(super::map((0..count).collect(), |item| 2 * item), expected, "{count}");
        }
    }
}
