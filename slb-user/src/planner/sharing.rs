//! Addresses and ports of backends that several listeners or VIPs share, or did until now.
//!
//! What such a backend answers belongs to the VIP that the flow's entry says. When it comes to have one VIP only, flows of
//! the others may live for an idle timeout: until then it is treated as before, so that no client gets an answer from
//! the address of another VIP.

use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};
use slb_common::abi::{Endpoint, RevNatFlags};

use crate::state::State;

/// What is shared, and what was.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    /// By the last plan; `None`: there was none, and the maps say it.
    shared: Option<FxHashSet<Endpoint>>,
    /// Those that have one VIP by now, and until when they are treated as before.
    until: FxHashMap<Endpoint, Instant>,
}

impl Sharing {
    /// Takes over what is shared now, of `all` that answer; flows are over after `idle` without a packet. Gives what is to
    /// be treated as shared.
    pub(super) fn update(
        &mut self,
        shared: FxHashSet<Endpoint>,
        all: &FxHashSet<Endpoint>,
        installed: &State,
        (now, idle): (Instant, Duration),
    ) -> FxHashSet<Endpoint> {
        let before = self.shared.take().unwrap_or_else(|| {
            let endpoints = installed.endpoints.iter();
            let shared =
                endpoints.filter(|(_, origin)| origin.flags.intersects(RevNatFlags::SHARED));
            shared.map(|(&at, _)| at).collect()
        });
        for at in before.difference(&shared) {
            self.until.entry(*at).or_insert(now + idle);
        }
        self.until.retain(|at, until| *until > now && all.contains(at) && !shared.contains(at));
        let treated = shared.iter().chain(self.until.keys()).copied().collect();
        self.shared = Some(shared);
        treated
    }

    /// When something is shared no more.
    pub(super) fn due(&self) -> Option<Instant> {
        self.until.values().min().copied()
    }
}
