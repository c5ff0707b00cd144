//! The types of the local API: requests, responses, and the model that status, metrics and commands show.
//!
//! Types only: the agent fills them, and commands, dashboards and tests read them. A number that is not known is
//! absent (`null` in JSON), never 0.

mod edit;
mod events;
mod explain;
mod flows;
mod problem;
mod status;
mod words;

pub use edit::{ConfigFile, Edit, Place, Reloaded};
pub use events::{Event, EventFilter, EventKind};
pub use explain::{ExplainRequest, ExplainResponse, FragmentPart, PacketProtocol};
pub use flows::{BusiestClient, FlowFilter, FlowState, FlowStatus, Flows};
pub use problem::{Problem, ProblemName, Severity};
pub use status::{
    BackendStatus, Drop, FlowTableStatus, Health, InstanceStatus, InterfaceStatus, LastProbe,
    ListenerStatus, MapStatus, Rates, Repairs, Role, Status, VerdictCount, XdpMode,
};
pub use words::{Protocol, Scheduler, UnknownWord};
