//! Memory that several CPUs and the agent read and write at the same time: the elements of maps.
//!
//! A reference to such memory would be undefined behaviour: `&mut` promises that there is no other access, and `&`
//! that nothing changes. [`SharedCell`] is a pointer instead. It reads and writes single words, and a field is reached
//! by a method of the field's name.
//!
//! # Order of accesses
//!
//! The rules are those of the BPF memory model, which is a part of the kernel's: Paul McKenney, "Instruction-Level BPF
//! Memory Model" (2024); `tools/memory-model` and `Documentation/atomic_t.txt` of the kernel.
//!
//! 1. [`SharedCell::load`] and [`SharedCell::store`] are `READ_ONCE` and `WRITE_ONCE`: aligned, in one instruction per
//!    word, neither merged nor repeated. The compiler keeps the order in which they stand in the source, that of
//!    other such accesses and of the atomic instructions included. They are volatile and not relaxed atomics because
//!    rustc has no atomics of less than 64 bits for BPF.
//! 2. Atomic instructions that give the word's former value ([`SharedCell::fetch_add`],
//!    [`SharedCell::compare_exchange`], [`Claim::publish`]) are full barriers, as `smp_mb()` before and after.
//! 3. The CPU may reorder plain loads and stores as its architecture allows. x86-64 moves neither loads before earlier
//!    loads nor stores before earlier stores, so what rule 1 keeps in order stays in order. arm64 may: there rule 2
//!    orders writers, and a reader may in theory see a word before what it guards. BPF has loads with acquire
//!    semantics only from Linux 6.15 on.
//! 4. A load whose address comes from another load is behind it, everywhere. An index into records needs no more.
//!
//! # Values of several words
//!
//! Words that belong together are guarded by one of them: [`Guarded`] is the only lock. A writer claims the guard by a
//! compare-exchange ([`SharedCell::claim`]); if another CPU has claimed it, the writer goes without. No CPU waits. A
//! reader compares the guard before and after ([`SharedCell::read`]). A word that means something alone is counted by
//! atomic instructions, or keeps what was written last.
//!
//! # What is read by reference
//!
//! Entries of hash maps that only the agent writes, records of the indices, and slots: the agent never writes them while
//! a program may read them, but replaces them. The seed of the tables: it is written before the first packet. The
//! scratch memory: it is this CPU's own. And `SLB_BACKENDS`, whose elements the agent does write in place, by one copy of
//! the kernel's: the packet path reads each field once, and a packet on its way during such a write may see fields of
//! both.

use core::ptr::NonNull;

use aya_ebpf::btf_maps::{Array, LruHashMap, PerCpuArray};
use slb_common::abi::{Address, ConnState, Mode, NextHop};

/// A value in memory that others may write at any time.
#[repr(transparent)]
pub struct SharedCell<T>(NonNull<T>);

impl<T> Clone for SharedCell<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedCell<T> {}

/// Maps whose elements stay where they are for as long as the map is there, and so longer than any program runs.
pub trait Elements<Key> {
    /// What an element is.
    type Element;

    /// The element of an index or key.
    fn cell(&self, key: Key) -> Option<SharedCell<Self::Element>>;
}

impl<T, const LEN: usize, const FLAGS: usize> Elements<u32> for Array<T, LEN, FLAGS> {
    type Element = T;

    #[inline(always)]
    fn cell(&self, index: u32) -> Option<SharedCell<T>> {
        self.get_ptr_mut(index).and_then(NonNull::new).map(SharedCell)
    }
}

/// The element of this CPU: only the agent reads it elsewhere.
impl<T, const LEN: usize, const FLAGS: usize> Elements<u32> for PerCpuArray<T, LEN, FLAGS> {
    type Element = T;

    #[inline(always)]
    fn cell(&self, index: u32) -> Option<SharedCell<T>> {
        self.get_ptr_mut(index).and_then(NonNull::new).map(SharedCell)
    }
}

/// Preallocated: the kernel may give an element to another key at any time, but keeps its memory.
impl<'a, K, V, const LEN: usize, const FLAGS: usize> Elements<&'a K>
    for LruHashMap<K, V, LEN, FLAGS>
{
    type Element = V;

    #[inline(always)]
    fn cell(&self, key: &'a K) -> Option<SharedCell<V>> {
        self.get_ptr_mut(key).and_then(NonNull::new).map(SharedCell)
    }
}

impl<T> SharedCell<T> {
    /// # Safety
    ///
    /// `value` must point to a part of the value of another cell.
    #[inline(always)]
    pub const unsafe fn part_of(value: *mut T) -> Self {
        // SAFETY: the caller vouches for it.
        Self(unsafe { NonNull::new_unchecked(value) })
    }

    /// Where it is.
    #[inline(always)]
    pub const fn as_ptr(self) -> *mut T {
        self.0.as_ptr()
    }
}

/// Gives [`SharedCell`]s of structures a method per field, of the field's name. `as` is for numbers with a type of their
/// own.
macro_rules! shared_fields {
    ($($of:ty { $($name:ident: $type:ty $(as $view:ty)?),+ $(,)? })+) => {$(
        impl $crate::cell::SharedCell<$of> {$(
            $crate::cell::shared_fields!(@field $name, $type, ($($view,)? $type));
        )+}
    )+};
    (@field $name:ident, $type:ty, ($view:ty $(, $of:ty)?)) => {
        #[inline(always)]
        pub const fn $name(self) -> $crate::cell::SharedCell<$view> {
            const { assert!(size_of::<$view>() == size_of::<$type>()) };
            // SAFETY: a field is a part of its value.
            unsafe {
                let field: *mut $type = &raw mut (*self.as_ptr()).$name;
                $crate::cell::SharedCell::part_of(field.cast())
            }
        }
    };
}
pub(crate) use shared_fields;

impl<T, const LEN: usize> SharedCell<[T; LEN]> {
    /// The element of an index, of which the low bits count: the verifier sees that it is inside.
    #[inline(always)]
    pub const fn at(self, index: usize) -> SharedCell<T> {
        const { assert!(LEN.is_power_of_two()) };
        // SAFETY: an element is a part of its array.
        unsafe { SharedCell::part_of(self.as_ptr().cast::<T>().add(index % LEN)) }
    }
}

/// What can be read and written: words, and plain values that are made of a few.
pub trait Value: Copy {
    /// Reads it, word by word.
    fn load(cell: SharedCell<Self>) -> Self;
    /// Writes it, word by word.
    fn store(cell: SharedCell<Self>, value: Self);
}

impl<T: Value> SharedCell<T> {
    /// Reads it.
    #[inline(always)]
    pub fn load(self) -> T {
        T::load(self)
    }

    /// Writes it.
    #[inline(always)]
    pub fn store(self, value: T) {
        T::store(self, value);
    }
}

macro_rules! words {
    ($($word:ty)+) => {$(
        impl Value for $word {
            #[inline(always)]
            fn load(cell: SharedCell<Self>) -> Self {
                // SAFETY: an aligned word of a map, of which any bits are valid.
                unsafe { cell.as_ptr().read_volatile() }
            }

            #[inline(always)]
            fn store(cell: SharedCell<Self>, value: Self) {
                // SAFETY: as above.
                unsafe { cell.as_ptr().write_volatile(value) }
            }
        }
    )+};
}
words! { u8 u16 u32 u64 ConnState Mode }

macro_rules! made_of_words {
    ($($type:ty: [$word:ty; $len:literal], [$($number:literal)+], $from:expr, $into:expr;)+) => {$(
        impl SharedCell<$type> {
            #[inline(always)]
            pub const fn words(self) -> SharedCell<[$word; $len]> {
                const { assert!(size_of::<$type>() == size_of::<[$word; $len]>()) };
                const { assert!(align_of::<$type>() == align_of::<$word>()) };
                // SAFETY: the same bytes, no less aligned.
                unsafe { SharedCell::part_of(self.as_ptr().cast()) }
            }
        }

        impl Value for $type {
            #[inline(always)]
            fn load(cell: SharedCell<Self>) -> Self {
                // No loop: the compiler would make an array on the stack of it.
                $from([$(cell.words().at($number).load()),+])
            }

            #[inline(always)]
            fn store(cell: SharedCell<Self>, value: Self) {
                let words = $into(value);
                $(cell.words().at($number).store(words[$number]);)+
            }
        }
    )+};
}
made_of_words! {
    Address: [u64; 2], [0 1], Address::from_halves, Address::halves;
    NextHop: [u32; 4], [0 1 2 3], NextHop::from_words, NextHop::words;
}

impl SharedCell<u64> {
    /// Adds, wrapping, and gives what was there before. A full barrier.
    #[inline(always)]
    pub fn fetch_add(self, value: u64) -> u64 {
        let mut turn = value;
        // SAFETY: one instruction on an aligned word of a map.
        #[cfg(target_arch = "bpf")]
        unsafe {
            core::arch::asm!(
                "{turn} = atomic_fetch_add((u64 *)({counter} + 0), {turn})",
                turn = inout(reg) turn,
                counter = in(reg) self.as_ptr(),
            );
        }
        not_on_the_host(&mut turn);
        turn
    }

    /// Adds to a word that only this CPU writes: others may read it meanwhile.
    #[inline(always)]
    pub fn add(self, value: u64) {
        self.store(self.load().wrapping_add(value));
    }
}

impl SharedCell<u32> {
    /// Writes `new`. A full barrier.
    #[inline(always)]
    fn exchange(self, new: u32) {
        let mut word = u64::from(new);
        // SAFETY: one instruction on an aligned word of a map.
        #[cfg(target_arch = "bpf")]
        unsafe {
            core::arch::asm!(
                "w2 = xchg32_32(r1 + 0, w2)",
                in("r1") self.as_ptr(),
                inout("r2") word,
            );
        }
        not_on_the_host(&mut word);
    }
}

macro_rules! compare_exchange {
    ($($word:ty: $instruction:literal;)+) => {$(
        impl SharedCell<$word> {
            /// Writes `new` if `old` is there, and says whether it was. A full barrier.
            #[inline(always)]
            pub fn compare_exchange(self, old: $word, new: $word) -> bool {
                let mut found = u64::from(old);
                // SAFETY: one instruction on an aligned word of a map.
                #[cfg(target_arch = "bpf")]
                unsafe {
                    core::arch::asm!(
                        $instruction,
                        inout("r0") found,
                        in("r1") self.as_ptr(),
                        in("r2") u64::from(new),
                    );
                }
                not_on_the_host(&mut (&mut found, new));
                found as $word == old
            }
        }
    )+};
}
compare_exchange! {
    u32: "w0 = cmpxchg32_32(r1 + 0, w0, w2)";
    u64: "r0 = cmpxchg_64(r1 + 0, r0, r2)";
}

/// Linters compile this file for the host, where there are no such instructions.
#[inline(always)]
fn not_on_the_host<T>(_: &mut T) {
    #[cfg(not(target_arch = "bpf"))]
    unreachable!("compiled for the host by linters only");
}

/// A value of several words, of which one guards the others: it changes with each write, and says whether there is one.
pub trait Guarded: Sized {
    /// The word.
    fn guard(cell: SharedCell<Self>) -> SharedCell<u32>;
    /// What it is while the value is written, given what it was before.
    fn claimed(before: u32) -> u32;
    /// Whether it says that the value is being written.
    fn is_claimed(guard: u32) -> bool;
}

/// What was read of a guarded value.
pub struct Reading<R> {
    /// The guard, before all else.
    pub guard: u32,
    /// The rest.
    pub value: R,
    /// Whether the guard was the same afterwards.
    pub is_unchanged: bool,
}

impl<T: Guarded> SharedCell<T> {
    /// Reads a part of it, and whether the guard stays the same meanwhile.
    #[inline(always)]
    pub fn read<R>(self, part: impl FnOnce(Self) -> R) -> Reading<R> {
        let guard = T::guard(self).load();
        let value = part(self);
        Reading { guard, value, is_unchanged: T::guard(self).load() == guard }
    }

    /// Claims it for writing. `None`: its guard is not `found` any more, or says that another CPU is writing.
    #[inline(always)]
    pub fn claim(self, found: u32) -> Option<Claim<T>> {
        let is_ours =
            !T::is_claimed(found) && T::guard(self).compare_exchange(found, T::claimed(found));
        is_ours.then_some(Claim(self))
    }
}

/// A value that only this CPU may write, until it is published.
#[must_use = "unless it is published, no CPU reads or writes the value any more"]
pub struct Claim<T>(SharedCell<T>);

impl<T: Guarded> Claim<T> {
    /// A claim that another function has made: registers have no room for it.
    #[inline(always)]
    pub const fn handed_over(cell: SharedCell<T>) -> Self {
        Self(cell)
    }

    /// What was claimed.
    #[inline(always)]
    pub const fn cell(&self) -> SharedCell<T> {
        self.0
    }

    /// Lets others read it. `guard` is not one that says that it is claimed.
    #[inline(always)]
    pub fn publish(self, guard: u32) {
        T::guard(self.0).exchange(guard);
    }
}
