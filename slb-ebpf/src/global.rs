//! Global functions of the object: the verifier looks at each once, not once per way to it.
//!
//! All that they may take is numbers and pointers to plain structures, of which the verifier says that they may be
//! null.

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

/// Makes global functions of others, which take references. The last expression is what they give for null.
macro_rules! global {
    ($($vis:vis fn $name:ident($($arg:ident: $type:ty),+) -> $returns:ty = $body:path, or $null:expr;)+) => {$(
        #[inline(always)]
        $vis fn $name($($arg: $type),+) -> $returns {
            use $crate::global::Argument;

            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name($($arg: <$type as Argument>::Raw),+) -> $returns {
                // SAFETY: only the function around this one calls it, with references that outlive the call.
                match unsafe { ($(<$type as Argument>::from_raw($arg),)+) } {
                    ($(Some($arg),)+) => $body($($arg),+),
                    _ => $null,
                }
            }

            $name($(Argument::into_raw($arg)),+)
        }
    )+};
}
pub(crate) use global;
