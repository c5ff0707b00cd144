//! The kernel's side: loading, pinning and attaching the program, and writing its maps.

mod batch;
mod bpffs;
mod counters;
mod decap;
mod error;
mod explain;
mod filter;
mod flow_table;
mod index;
mod kept;
mod links;
mod loader;
mod map_check;
mod maps;
mod memory;
mod pins;
mod slots;
mod syscall;
#[cfg(feature = "trace")]
mod trace;

pub use batch::Batch;
pub use bpffs::BpffsError;
pub use counters::Counters;
pub use decap::{Decap, Decapsulated};
pub use error::LoadError;
pub use explain::{Explainer, Explanation, Kind, Part, Question, Step};
pub use flow_table::{FlowTable, SweepReport, SweepRequest, Watched};
pub use kept::{KeptMaps, Large, MapContents};
pub use links::Attachment;
pub use loader::{Capacities, DECAP, Loaded, OBJECT, PRELUDE, Restored};
pub use maps::{Applied, Drift, Maps, TableError};
pub use pins::{Pins, unload};
