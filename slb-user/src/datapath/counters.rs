//! The counters of the datapath, read for all backends by a few system calls.
//!
//! The kernel does not map per-CPU arrays into memory, and one system call per element takes seconds with thousands of
//! backends. `BPF_MAP_LOOKUP_BATCH` (Linux 5.13 for per-CPU arrays) copies many elements at once.

use std::{
    io,
    marker::PhantomData,
    ops::Range,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{maps::MapData, util::nr_cpus};
use slb_common::{
    abi::{Counter, SynAnswers, Traffic},
    verdict::Verdict,
};
use zerocopy::{FromBytes, IntoBytes as _};

use super::{Pins, TableError};

/// `BPF_MAP_LOOKUP_BATCH` of `enum bpf_cmd` in `linux/bpf.h`.
const LOOKUP_BATCH: libc::c_int = 24;
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

/// The part of `union bpf_attr` for batches, in `linux/bpf.h`.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
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
        let map = MapData::from_pin(pins.map(name)).map_err(refused)?;
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
        // The kernel begins behind this key.
        let (before, mut last) = (first.wrapping_sub(1), 0_u32);
        let mut batch = Batch {
            in_batch: if first == 0 { 0 } else { (&raw const before).expose_provenance() as u64 },
            out_batch: (&raw mut last).expose_provenance() as u64,
            keys: keys.as_mut_ptr().expose_provenance() as u64,
            values: values.as_mut_ptr().expose_provenance() as u64,
            count: count as u32,
            map: self.map.fd().as_fd().as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel writes at most `count` keys and values, and there is room for them: each value takes
        // `cpus * words` words.
        let done = unsafe {
            libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut batch, size_of::<Batch>())
        };
        let read = batch.count as usize;
        let error = io::Error::last_os_error();
        // At the end of the map the kernel says that there is nothing more, and how much it has read.
        let is_end = done < 0 && error.kind() == io::ErrorKind::NotFound && read > 0;
        if done < 0 && !is_end {
            return Err(error);
        }
        if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(read.min(count)) }
    }
}
