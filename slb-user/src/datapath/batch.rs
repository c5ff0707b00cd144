//! Many elements of a map by one system call: with thousands of backends, one call for each takes seconds.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::MapData;
use zerocopy::{FromBytes, IntoBytes};

/// `BPF_MAP_LOOKUP_BATCH` of `enum bpf_cmd` in `linux/bpf.h` (Linux 5.6; 5.13 for per-CPU arrays).
const LOOKUP_BATCH: libc::c_int = 24;
/// Elements of a hash map that one system call copies at most; far more than share a bucket.
const ELEMENTS: usize = 4_096;

/// The part of `union bpf_attr` for batches, in `linux/bpf.h`.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Batch {
    /// Address of the cursor where the batch begins; 0: at the beginning of the map.
    pub in_batch: u64,
    /// Address of the cursor where the next batch begins.
    pub out_batch: u64,
    /// Address of the keys.
    pub keys: u64,
    /// Address of the values.
    pub values: u64,
    /// How many elements there is room for, and then how many there are.
    pub count: u32,
    /// Descriptor of the map.
    pub map: u32,
    /// `BPF_F_LOCK`, or 0.
    pub element_flags: u64,
    /// None are known.
    pub flags: u64,
}

/// Where a batch begins or has ended, as the kernel puts it: at most a key.
type Cursor = [u64; 8];

/// Copies elements of a map into `keys` and `values`, from where `cursor` is on; `None`: from the beginning. Moves
/// `cursor`, and says how many were copied, and whether they were the last.
///
/// # Errors
///
/// The kernel's answer.
///
/// # Safety
///
/// There is room for as many values as keys, each as long as the kernel makes it.
pub(super) unsafe fn lookup<K: FromBytes + IntoBytes>(
    map: &MapData,
    cursor: &mut Option<Cursor>,
    keys: &mut [K],
    values: *mut u8,
) -> io::Result<(usize, bool)> {
    const { assert!(size_of::<K>() <= size_of::<Cursor>()) };
    let (before, mut after) = (*cursor, Cursor::default());
    let mut batch = Batch {
        in_batch: before.as_ref().map_or(0, |before| before.as_ptr().expose_provenance() as u64),
        out_batch: after.as_mut_ptr().expose_provenance() as u64,
        keys: keys.as_mut_ptr().expose_provenance() as u64,
        values: values.expose_provenance() as u64,
        count: keys.len() as u32,
        map: map.fd().as_fd().as_raw_fd() as u32,
        ..Batch::default()
    };
    // SAFETY: the kernel writes at most `count` keys and values, for which there is room, and a cursor.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_BATCH, &raw mut batch, size_of::<Batch>()) };
    let error = io::Error::last_os_error();
    // At the end of the map the kernel says that there is nothing more, and how much it has read.
    let is_end = done < 0 && error.kind() == io::ErrorKind::NotFound;
    if done < 0 && !is_end {
        return Err(error);
    }
    *cursor = Some(after);
    Ok(((batch.count as usize).min(keys.len()), is_end))
}

/// The cursor in an array ahead of the element `first`; the kernel goes on behind the element that a cursor names.
pub(super) fn ahead_of(first: u32) -> Option<Cursor> {
    let mut cursor = Cursor::default();
    cursor.as_mut_bytes()[..4].copy_from_slice(&first.checked_sub(1)?.to_ne_bytes());
    Some(cursor)
}

/// All elements of a hash map.
///
/// # Errors
///
/// The kernel's answer.
pub(super) fn contents<K, V>(map: &MapData) -> io::Result<Vec<(K, V)>>
where
    K: FromBytes + IntoBytes + Copy,
    V: FromBytes + Copy,
{
    let mut keys = vec![K::new_zeroed(); ELEMENTS];
    let mut values = vec![V::new_zeroed(); ELEMENTS];
    let (mut all, mut cursor) = (Vec::new(), None);
    loop {
        // SAFETY: there are as many values as keys, and the map's are such values.
        let read = unsafe { lookup(map, &mut cursor, &mut keys, values.as_mut_ptr().cast()) };
        let (count, is_end) = read?;
        all.extend(keys[..count].iter().copied().zip(values[..count].iter().copied()));
        if is_end {
            return Ok(all);
        }
    }
}
