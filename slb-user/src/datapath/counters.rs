//! The counters of the datapath, read for all backends by a few system calls.
//!
//! The kernel does not map per-CPU arrays into memory.

use std::{io, marker::PhantomData, ops::Range};

use aya::{maps::MapData, util::nr_cpus};
use slb_common::{
    abi::{Counter, SynAnswers, Traffic},
    verdict::Verdict,
};
use zerocopy::{FromBytes, IntoBytes as _};

use super::{Pins, TableError, batch};

/// Bytes that one system call copies at most, so that the buffer stays in the CPU's cache.
const BUFFER: usize = 256 * 1024;

/// What the datapath counts.
#[derive(Debug)]
pub struct Counters {
    traffic: PerCpu<Traffic>,
    answers: PerCpu<SynAnswers>,
    verdicts: PerCpu<Counter>,
}

impl Counters {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn open(pins: &Pins) -> Result<Self, TableError> {
        Ok(Self {
            traffic: PerCpu::open(pins, "SLB_TRAFFIC")?,
            answers: PerCpu::open(pins, "SLB_PASSIVE_HC")?,
            verdicts: PerCpu::open(pins, "SLB_VERDICTS")?,
        })
    }

    /// What the backends with these indices into `SLB_BACKENDS` have got, in their order.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn traffic(&self, backends: Range<u32>) -> Result<Vec<Traffic>, TableError> {
        self.traffic.sums(backends)
    }

    /// How these backends have answered SYNs, in their order.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn answers(&self, backends: Range<u32>) -> Result<Vec<SynAnswers>, TableError> {
        self.answers.sums(backends)
    }

    /// How many frames, and bytes, have ended in each verdict.
    ///
    /// # Errors
    ///
    /// [`TableError`].
    pub fn verdicts(&self) -> Result<Vec<(Verdict, Counter)>, TableError> {
        let slots = Verdict::ALL.iter().map(|verdict| *verdict as u32);
        let sums = self.verdicts.sums(0..slots.max().map_or(0, |last| last + 1))?;
        Ok(Verdict::ALL.iter().map(|&verdict| (verdict, sums[verdict as usize])).collect())
    }
}

/// A pinned per-CPU array.
#[derive(Debug)]
struct PerCpu<T> {
    name: &'static str,
    map: MapData,
    len: u32,
    cpus: usize,
    element: PhantomData<T>,
}

/// A value of which every CPU has its own.
trait Summed: FromBytes + Default {
    /// Adds another CPU's.
    fn add(&mut self, other: Self);
}

impl Summed for Traffic {
    fn add(&mut self, other: Self) {
        *self += other;
    }
}

impl Summed for SynAnswers {
    fn add(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.refused += other.refused;
    }
}

impl Summed for Counter {
    fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl<T: Summed> PerCpu<T> {
    fn open(pins: &Pins, name: &'static str) -> Result<Self, TableError> {
        let refused = |source| TableError::Map { map: name, source };
        let map = pins.open_map(name).map_err(refused)?;
        let len = map.info().map_err(refused)?.max_entries();
        let cpus = nr_cpus().map_err(|(_, source)| TableError::Batch { map: name, source })?;
        Ok(Self { name, map, len, cpus, element: PhantomData })
    }

    /// The sums over all CPUs of these elements. Elements that the map does not have are left out.
    fn sums(&self, wanted: Range<u32>) -> Result<Vec<T>, TableError> {
        let end = wanted.end.min(self.len);
        // The kernel gives each CPU's value a multiple of 8 bytes.
        let words = size_of::<T>().div_ceil(8);
        let most = (BUFFER / (8 * words * self.cpus)).max(1);
        let mut sums = Vec::with_capacity(end.saturating_sub(wanted.start) as usize);
        let mut values = Vec::<u64>::new();
        let mut next = wanted.start;
        while next < end {
            let count = most.min((end - next) as usize);
            values.resize(count * self.cpus * words, 0);
            let read = self
                .read(next, count, &mut values)
                .map_err(|source| TableError::Batch { map: self.name, source })?;
            for element in values.chunks_exact(self.cpus * words).take(read) {
                let mut sum = T::default();
                for cpu in element.chunks_exact(words) {
                    if let Ok((value, _)) = T::read_from_prefix(cpu.as_bytes()) {
                        sum.add(value);
                    }
                }
                sums.push(sum);
            }
            next += read as u32;
        }
        Ok(sums)
    }

    /// Reads up to `count` elements from `first` on, and says how many.
    fn read(&self, first: u32, count: usize, values: &mut [u64]) -> io::Result<usize> {
        let mut keys = vec![0_u32; count];
        let mut cursor = batch::ahead_of(first);
        // SAFETY: there is room for `count` values, each of which takes `cpus * words` words.
        let read =
            unsafe { batch::lookup(&self.map, &mut cursor, &mut keys, values.as_mut_ptr().cast()) };
        let (read, _) = read?;
        if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(read) }
    }
}
