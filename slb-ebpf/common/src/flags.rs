//! Sets of flags in the layouts of the maps.

/// Defines a set of flags of which any bits are valid: those without a name are kept.
macro_rules! flags {
    ($(#[$of:meta])* pub struct $name:ident: $word:ty { $($flags:tt)* }) => {
        $(#[$of])*
        #[repr(transparent)]
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, Default,
            zerocopy::FromBytes, zerocopy::Immutable, zerocopy::IntoBytes,
        )]
        pub struct $name($word);

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                bitflags::parser::to_writer(self, f)
            }
        }

        bitflags::bitflags! {
            impl $name: $word { $($flags)* }
        }
    };
}
pub(crate) use flags;
