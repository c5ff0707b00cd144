//! Global functions of the object: the verifier looks at each once, not once per way to it.
//!
//! All that they may take is numbers and pointers to plain structures, of which the verifier says that they may be
//! null; all that they may give is a number.

use slb_common::verdict::Verdict;

/// What a global function can take.
pub trait Argument: Sized {
    /// As it passes through a register.
    type Raw;

    fn into_raw(self) -> Self::Raw;

    /// # Safety
    ///
    /// `raw` is what [`Argument::into_raw`] has made of a value that is still valid, or null.
    unsafe fn from_raw(raw: Self::Raw) -> Option<Self>;
}

impl Argument for u32 {
    type Raw = Self;

    #[inline(always)]
    fn into_raw(self) -> Self {
        self
    }

    #[inline(always)]
    unsafe fn from_raw(raw: Self) -> Option<Self> {
        Some(raw)
    }
}

impl<T> Argument for &T {
    type Raw = *const T;

    #[inline(always)]
    fn into_raw(self) -> *const T {
        self
    }

    #[inline(always)]
    unsafe fn from_raw(raw: *const T) -> Option<Self> {
        // SAFETY: the caller vouches for it.
        unsafe { raw.as_ref() }
    }
}

impl<T> Argument for &mut T {
    type Raw = *mut T;

    #[inline(always)]
    fn into_raw(self) -> *mut T {
        self
    }

    #[inline(always)]
    unsafe fn from_raw(raw: *mut T) -> Option<Self> {
        // SAFETY: the caller vouches for it.
        unsafe { raw.as_mut() }
    }
}

/// What a function that is called gives, in one register.
pub trait Packed: Sized {
    /// The register.
    type Register;

    fn pack(self) -> Self::Register;

    fn unpack(register: Self::Register) -> Self;
}

macro_rules! numbers {
    ($($number:ty)+) => {$(
        impl Packed for $number {
            type Register = Self;

            #[inline(always)]
            fn pack(self) -> Self {
                self
            }

            #[inline(always)]
            fn unpack(register: Self) -> Self {
                register
            }
        }
    )+};
}
numbers! { u32 u64 }

impl Packed for bool {
    type Register = u32;

    #[inline(always)]
    fn pack(self) -> u32 {
        self.into()
    }

    #[inline(always)]
    fn unpack(register: u32) -> Self {
        register != 0
    }
}

/// In the register of a result: the rest is a verdict.
const IS_VERDICT: u64 = 1 << 32;

impl<T: Packed<Register = u32>> Packed for Result<T, Verdict> {
    type Register = u64;

    #[inline(always)]
    fn pack(self) -> u64 {
        match self {
            Ok(value) => value.pack().into(),
            Err(verdict) => IS_VERDICT | verdict as u64,
        }
    }

    #[inline(always)]
    fn unpack(register: u64) -> Self {
        if register & IS_VERDICT == 0 {
            Ok(T::unpack(register as u32))
        } else {
            Err(Verdict::from_slot(register as u32))
        }
    }
}

/// Makes global functions of others, which take references. The last expression is what they give for null.
macro_rules! global {
    ($($vis:vis fn $name:ident($($arg:ident: $type:ty),+) -> $returns:ty = $body:path, or $null:expr;)+) => {$(
        #[inline(always)]
        $vis fn $name($($arg: $type),+) -> $returns {
            use $crate::global::{Argument, Packed};

            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name(
                $($arg: <$type as Argument>::Raw),+
            ) -> <$returns as Packed>::Register {
                // SAFETY: only the function around this one calls it, with references that outlive the call.
                let given: $returns = match unsafe { ($(<$type as Argument>::from_raw($arg),)+) } {
                    ($(Some($arg),)+) => $body($($arg),+),
                    _ => $null,
                };
                given.pack()
            }

            Packed::unpack($name($(Argument::into_raw($arg)),+))
        }
    )+};
}
pub(crate) use global;
