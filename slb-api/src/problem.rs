//! What an operator should see to.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::words;

/// Something that an operator should see to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Which kind of problem: stable, for alerts and scripts.
    pub name: ProblemName,
    /// How bad it is.
    pub severity: Severity,
    /// What has the problem: an interface, a backend, a setting; `null`: the gateway as a whole.
    pub subject: Option<String>,
    /// What is wrong and what to do about it.
    pub text: String,
    /// Seconds since 1970 when it was first seen; `null`: not recorded.
    pub since: Option<f64>,
}

/// How bad a problem is. The worst is the greatest.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is lost; a setting waits or a report is missing.
    Notice,
    /// Part of the work is not done, or soon will not be.
    Warning,
    /// Traffic is lost or not balanced.
    Critical,
}

words!(Severity { Notice = "notice", Warning = "warning", Critical = "critical" });

/// Names of problems. They do not change; texts may.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum ProblemName {
    /// The maps of the datapath could not be written.
    MapsNotWritten,
    /// The settings of the datapath could not be written.
    SettingsNotWritten,
    /// XDP could not be attached to an interface.
    XdpNotAttached,
    /// XDP could not be detached from an interface that was taken out of the configuration.
    XdpNotDetached,
    /// Interfaces could not be asked for their XDP programs.
    InterfacesUnknown,
    /// Next hops of backends could not be asked for.
    NextHopsUnknown,
    /// Addresses of this host could not be asked for.
    AddressesUnknown,
    /// Neighbour entries could not be kept.
    NeighboursNotKept,
    /// A VIP could not be taken or announced.
    VipsNotAnnounced,
    /// Another host claims a VIP.
    VipClaimed,
    /// An interface of the configuration is missing or down.
    InterfaceDown,
    /// The program keeps ways to clients that may be wrong.
    RoutesOutdated,
    /// The gateway lacks what probes take, so health is kept as it was.
    ProbesShortOfResources,
    /// The metrics are not served.
    MetricsNotServed,
    /// The kernel does not forward packets.
    ForwardingOff,
    /// Replies of a backend do not come back through XDP.
    BackendBypassesXdp,
    /// The kernel drops replies that the datapath leaves to it.
    RepliesDroppedByKernel,
    /// Backends behind full NAT have no source address.
    NoSourceAddress,
    /// Too few files can be open for all probes.
    TooFewDescriptors,
    /// The pins do not survive, or are not where they should be.
    PinsNotKept,
    /// The flow table holds nearly as many flows as it was made for, or more.
    FlowTableFilling,
    /// The flow table has another size than the configuration says.
    FlowTableSize,
    /// The last reload was refused.
    ReloadRefused,
    /// Another program has changed a map of the datapath; the agent has written it again.
    MapsChanged,
    /// XDP was detached from an interface; the agent has attached it again.
    XdpDetached,
    /// Pins were removed; the agent has made them again.
    PinsRemoved,
    /// The datapath could not be compared with what the agent has set up.
    DatapathNotAudited,
}

words!(ProblemName {
    MapsNotWritten = "maps_not_written",
    SettingsNotWritten = "settings_not_written",
    XdpNotAttached = "xdp_not_attached",
    XdpNotDetached = "xdp_not_detached",
    InterfacesUnknown = "interfaces_unknown",
    NextHopsUnknown = "next_hops_unknown",
    AddressesUnknown = "addresses_unknown",
    NeighboursNotKept = "neighbours_not_kept",
    VipsNotAnnounced = "vips_not_announced",
    VipClaimed = "vip_claimed",
    InterfaceDown = "interface_down",
    RoutesOutdated = "routes_outdated",
    ProbesShortOfResources = "probes_short_of_resources",
    MetricsNotServed = "metrics_not_served",
    ForwardingOff = "forwarding_off",
    BackendBypassesXdp = "backend_bypasses_xdp",
    RepliesDroppedByKernel = "replies_dropped_by_kernel",
    NoSourceAddress = "no_source_address",
    TooFewDescriptors = "too_few_descriptors",
    PinsNotKept = "pins_not_kept",
    FlowTableFilling = "flow_table_filling",
    FlowTableSize = "flow_table_size",
    ReloadRefused = "reload_refused",
    MapsChanged = "maps_changed",
    XdpDetached = "xdp_detached",
    PinsRemoved = "pins_removed",
    DatapathNotAudited = "datapath_not_audited",
});

impl ProblemName {
    /// How bad a problem of this name is.
    #[must_use]
    pub const fn severity(self) -> Severity {
        match self {
            Self::MapsNotWritten
            | Self::SettingsNotWritten
            | Self::XdpNotAttached
            | Self::VipsNotAnnounced
            | Self::VipClaimed
            | Self::InterfaceDown
            | Self::ForwardingOff
            | Self::BackendBypassesXdp
            | Self::RepliesDroppedByKernel
            | Self::NoSourceAddress => Severity::Critical,
            Self::XdpNotDetached
            | Self::InterfacesUnknown
            | Self::NextHopsUnknown
            | Self::AddressesUnknown
            | Self::NeighboursNotKept
            | Self::RoutesOutdated
            | Self::ProbesShortOfResources
            | Self::TooFewDescriptors
            | Self::PinsNotKept
            | Self::FlowTableFilling
            | Self::ReloadRefused
            | Self::MapsChanged
            | Self::XdpDetached
            | Self::PinsRemoved
            | Self::DatapathNotAudited => Severity::Warning,
            Self::MetricsNotServed | Self::FlowTableSize => Severity::Notice,
        }
    }
}

impl Problem {
    /// A problem of the whole gateway, first seen at no recorded time.
    #[must_use]
    pub const fn new(name: ProblemName, text: String) -> Self {
        Self { name, severity: name.severity(), subject: None, text, since: None }
    }

    /// The same problem, of this subject.
    #[must_use]
    pub fn of(self, subject: impl Into<String>) -> Self {
        Self { subject: Some(subject.into()), ..self }
    }

    /// Puts the worst first; among equals the order stays.
    pub fn sort(problems: &mut [Self]) {
        problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_names_are_those_of_json() {
        for (word, name) in ProblemName::WORDS {
            assert_eq!(serde_json::to_value(name).unwrap(), *word);
        }
        for (word, severity) in Severity::WORDS {
            assert_eq!(serde_json::to_value(severity).unwrap(), *word);
        }
    }

    #[test]
    fn sorting_puts_the_worst_first() {
        let names = [
            ProblemName::FlowTableSize,
            ProblemName::ReloadRefused,
            ProblemName::ForwardingOff,
            ProblemName::MapsNotWritten,
        ];
        let mut problems = names.map(|name| Problem::new(name, String::new()));
        Problem::sort(&mut problems);
        let sorted = problems.map(|problem| problem.name);
        let expected = [
            ProblemName::ForwardingOff,
            ProblemName::MapsNotWritten,
            ProblemName::ReloadRefused,
            ProblemName::FlowTableSize,
        ];
        assert_eq!(sorted, expected);
    }
}
