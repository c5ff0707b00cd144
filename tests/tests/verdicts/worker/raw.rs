//! A pinned map as bytes, of any types.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
};

use aya::{
    maps::{MapData, MapType},
    util::nr_cpus,
};
use slb_user::datapath::Batch;

/// `enum bpf_cmd` of `linux/bpf.h`.
const LOOKUP: libc::c_int = 1;
const UPDATE: libc::c_int = 2;
const DELETE: libc::c_int = 3;
const NEXT_KEY: libc::c_int = 4;
const UPDATE_BATCH: libc::c_int = 26;

/// The part of `union bpf_attr` for one element.
#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

/// A map.
pub(super) struct Raw {
    pub name: String,
    pub kind: MapType,
    /// Bytes of a value, as user space sees it: for all CPUs.
    pub value: usize,
    key: usize,
    entries: u32,
    map: MapData,
}

impl Raw {
    pub(super) fn open(pin: &Path) -> Self {
        let map = MapData::from_pin(pin).expect("a map");
        let info = map.info().expect("a map");
        let kind = info.map_type().expect("a known type");
        let value = info.value_size() as usize;
        let value = match kind {
            MapType::PerCpuArray => value.next_multiple_of(8) * nr_cpus().expect("CPUs"),
            _ => value,
        };
        let name = pin.file_name().expect("a name").to_string_lossy().into_owned();
        let (key, entries) = (info.key_size() as usize, info.max_entries());
        Self { name, kind, value, key, entries, map }
    }

    /// Gives every element of an array this value.
    pub(super) fn fill(&self, value: &[u8]) {
        let keys: Vec<u32> = (0..self.entries).collect();
        let values = value.repeat(keys.len());
        let batch = Batch {
            keys: keys.as_ptr().expose_provenance() as u64,
            values: values.as_ptr().expose_provenance() as u64,
            count: self.entries,
            map: self.descriptor(),
            ..Batch::default()
        };
        // SAFETY: the kernel reads as many keys and values as there are.
        unsafe { bpf(UPDATE_BATCH, &batch) }
            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// All keys, as they were when this began.
    pub(super) fn keys(&self) -> impl Iterator<Item = Vec<u8>> {
        let mut keys = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        loop {
            let mut next = vec![0; self.key];
            // SAFETY: the kernel reads one key and writes one.
            match unsafe { self.element(NEXT_KEY, key.as_deref(), &mut next) } {
                Ok(()) => keys.push(next.clone()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => panic!("{}: {error}", self.name),
            }
            key = Some(next);
        }
        keys.into_iter()
    }

    pub(super) fn delete(&self, key: &[u8]) {
        // SAFETY: the kernel reads the key.
        match unsafe { self.element(DELETE, Some(key), &mut []) } {
            // An LRU map may have dropped it.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                panic!("{}: {error}", self.name)
            }
            _ => {}
        }
    }

    pub(super) fn lookup(&self, key: &[u8]) -> io::Result<Vec<u8>> {
        let mut value = vec![0; self.value];
        // SAFETY: the kernel reads the key and writes one value.
        unsafe { self.element(LOOKUP, Some(key), &mut value) }.map(|()| value)
    }

    /// Everything in it.
    pub(super) fn contents(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let keys = self.keys();
        keys.filter_map(|key| self.lookup(&key).ok().map(|value| (key, value))).collect()
    }

    /// Changes every element of an array; puts something into any other map.
    pub(super) fn litter(&self) {
        match self.kind {
            MapType::ProgramArray => {}
            MapType::Array | MapType::PerCpuArray => self.fill(&vec![0x5a; self.value]),
            kind => {
                let mut key = vec![0x5a; self.key];
                if kind == MapType::LpmTrie {
                    key[..4].copy_from_slice(&32_u32.to_ne_bytes());
                }
                // SAFETY: the kernel reads key and value.
                unsafe { self.element(UPDATE, Some(&key), &mut vec![0x5a; self.value]) }
                    .expect("an entry");
            }
        }
    }

    /// # Safety
    ///
    /// `key` is as long as one is, and `value` as long as what the command reads or writes.
    unsafe fn element(
        &self,
        command: libc::c_int,
        key: Option<&[u8]>,
        value: &mut [u8],
    ) -> io::Result<()> {
        let element = Element {
            map: self.descriptor(),
            padding: 0,
            key: key.map_or(0, |key| key.as_ptr().expose_provenance() as u64),
            // The kernel refuses to delete if there is anything here.
            value: if value.is_empty() { 0 } else { value.as_mut_ptr().expose_provenance() as u64 },
            flags: 0,
        };
        // SAFETY: as the caller says.
        unsafe { bpf(command, &element) }
    }

    fn descriptor(&self) -> u32 {
        u32::try_from(self.map.fd().as_fd().as_raw_fd()).expect("a descriptor")
    }
}

/// # Safety
///
/// `attributes` are those of the command.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<()> {
    // SAFETY: as the caller says.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
