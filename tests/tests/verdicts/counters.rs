//! The agent's reading of per-CPU counters.

use aya::{
    maps::{PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use slb_common::abi::{MAX_BACKENDS, Traffic};
use slb_user::datapath::Counters;

use super::fixture::with_slb;

/// What one CPU counts for a backend: another number in each field, for each CPU and backend.
fn counted(backend: u32, cpu: u64) -> Traffic {
    let base = u64::from(backend) * 1_000 + cpu;
    Traffic {
        flows: base,
        packets: base + 100,
        bytes: base + 200,
        reply_packets: base + 300,
        reply_bytes: base + 400,
    }
}

#[test]
#[ignore = "needs root"]
fn given_counters_of_many_backends_when_read_in_batches_then_each_has_the_sum_of_its_cpus() {
    with_slb(|slb| {
        let cpus = nr_cpus().expect("CPUs") as u64;
        let last = MAX_BACKENDS as u32 - 1;
        let mut map: PerCpuArray<_, Traffic> =
            slb.pinned("SLB_TRAFFIC").try_into().expect("an array");
        let backends = [0, 1, 2, 699, 700, 20_000, last];
        for backend in backends {
            let values: Vec<_> = (0..cpus).map(|cpu| counted(backend, cpu)).collect();
            map.set(backend, PerCpuValues::try_from(values).expect("one per CPU"), 0)
                .expect("a write");
        }
        let sum = |backend: u32| {
            let mut sum = Traffic::default();
            if backends.contains(&backend) {
                (0..cpus).for_each(|cpu| sum += counted(backend, cpu));
            }
            sum
        };
        let counters = Counters::open(&slb.pins()).expect("the maps");
        // All, which takes several system calls; from the middle on; none; and beyond the end.
        for range in [0..last + 1, 1..3, 700..701, 699..20_001, 5..5, last..last + 9] {
            let found = counters.traffic(range.clone()).expect("counters");
            let expected: Vec<_> = (range.start..range.end.min(last + 1)).map(sum).collect();
            assert!(found == expected, "{range:?}");
        }
    });
}
