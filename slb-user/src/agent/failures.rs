//! What went wrong and is tried again: told once in the log, and a problem in the status until it is over.

use std::{collections::BTreeMap, error::Error};

use slb_api::{Problem, ProblemName};
use tracing::{error, info};

use crate::error_chain::error_chain;

/// The last error of each task that is tried again, by the problem that it makes.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<ProblemName, String>);

impl Failures {
    /// Takes down how an attempt has ended; `problem` is what a failure of it means.
    pub(super) fn note<E: Error + 'static>(&mut self, problem: ProblemName, result: Result<(), E>) {
        let task = task(problem);
        let Err(error) = result else {
            if self.0.remove(&problem).is_some() {
                info!(task, "recovered");
            }
            return;
        };
        let text = error_chain(&error);
        if self.0.get(&problem) != Some(&text) {
            error!(task, error = text, "failed; trying again");
        }
        self.0.insert(problem, text);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.0
            .iter()
            .map(|(&problem, text)| Problem::new(problem, format!("{}: {text}", task(problem))))
    }
}

/// The name of the task in the log and in texts.
const fn task(problem: ProblemName) -> &'static str {
    match problem {
        ProblemName::MapsNotWritten => "maps",
        ProblemName::SettingsNotWritten => "settings",
        ProblemName::XdpNotAttached => "XDP",
        ProblemName::XdpNotDetached => "XDP elsewhere",
        ProblemName::InterfacesUnknown => "interfaces",
        ProblemName::NextHopsUnknown => "next hops",
        ProblemName::AddressesUnknown => "addresses",
        ProblemName::NeighboursNotKept => "neighbours",
        ProblemName::VipsNotAnnounced => "VIPs",
        ProblemName::RoutesOutdated => "route epoch",
        ProblemName::ProbesShortOfResources => "health checks",
        ProblemName::PinsNotKept => "pins",
        ProblemName::DatapathNotAudited => "audit",
        ProblemName::MetricsNotServed => "metrics",
        other => other.as_str(),
    }
}
