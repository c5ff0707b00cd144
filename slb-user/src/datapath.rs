//! The kernel's side: loading, pinning and attaching the program, and writing its maps.

mod bpffs;
mod loader;
mod maps;
mod slots;
#[cfg(feature = "trace")]
mod trace;

pub use bpffs::BpffsError;
pub use loader::{Attachment, Capacities, LoadError, Loaded, OBJECT, Pins, unload};
pub use maps::{Maps, TableError};
