//! Maps whose memory the program, the kernel and the agent share.

use std::{
    marker::PhantomData,
    os::fd::AsFd as _,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering},
};

use memmap2::{MmapOptions, MmapRaw};
use zerocopy::{FromBytes, IntoBytes};

use super::{Pins, TableError};

const WORD: usize = size_of::<AtomicU32>();

/// The elements of a pinned array map (`BPF_F_MMAPABLE`), as they are.
///
/// Others write to it at any time: every access is to one word of an element, and atomic.
#[derive(Debug)]
pub(super) struct Memory<T> {
    memory: MmapRaw,
    len: usize,
    element: PhantomData<T>,
}

// SAFETY: the mapping lives as long as this, and is only accessed by atomics.
unsafe impl<T> Send for Memory<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Memory<T> {}

impl<T: FromBytes> Memory<T> {
    /// Maps the memory of a pinned map.
    ///
    /// # Errors
    ///
    /// [`TableError`]: it is not there, or its memory cannot be mapped.
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, TableError> {
        let refused = |source| TableError::Map { map: name, source };
        let map = pins.open_map(name).map_err(refused)?;
        let len = map.info().map_err(refused)?.max_entries() as usize;
        // Elements begin at multiples of 8 bytes.
        let bytes = len * size_of::<T>().next_multiple_of(8);
        let memory = MmapOptions::new()
            .len(bytes)
            .map_raw(&map.fd().as_fd())
            .map_err(|source| TableError::Memory { map: name, source })?;
        Ok(Self { memory, len, element: PhantomData })
    }

    /// How many elements there are.
    #[must_use]
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Where the first element begins; there is no map without one.
    pub(super) fn first(&self) -> NonNull<T> {
        NonNull::new(self.memory.as_mut_ptr().cast()).unwrap_or(NonNull::dangling())
    }

    /// Where an element begins; `None` if there is none of this number.
    #[must_use]
    pub(super) fn element(&self, index: usize) -> Option<NonNull<T>> {
        let size = size_of::<T>().next_multiple_of(8);
        let at = (index < self.len).then(|| self.memory.as_mut_ptr().wrapping_add(index * size))?;
        NonNull::new(at.cast())
    }

    /// The words of an element; `None` if there is none of this number.
    #[must_use]
    pub(super) fn words(&self, index: usize) -> Option<&[AtomicU32]> {
        const { assert!(size_of::<T>().is_multiple_of(WORD) && align_of::<T>() >= WORD) };
        let words = ptr::slice_from_raw_parts(
            self.element(index)?.as_ptr().cast::<AtomicU32>(),
            size_of::<T>() / WORD,
        );
        // SAFETY: as many words of the mapping, which lives as long as `self`; they are accessed by atomics only.
        Some(unsafe { &*words })
    }

    /// Copies an element word by word; `None` if there is none of this number.
    #[must_use]
    pub(super) fn load(&self, index: usize) -> Option<T>
    where
        T: IntoBytes,
    {
        self.words(index).map(load)
    }
}

/// Copies what these words are.
pub(super) fn load<T: FromBytes + IntoBytes>(words: &[AtomicU32]) -> T {
    let mut value = T::new_zeroed();
    for (bytes, word) in value.as_mut_bytes().chunks_exact_mut(WORD).zip(words) {
        bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
    }
    value
}
