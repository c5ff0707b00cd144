//! What a listener has besides its schedule: access list, limits, persistence.

use std::{collections::BTreeMap, sync::Arc};

use slb_common::abi::{Limits, ListenerFlags};

use super::Inputs;
use crate::{
    config::{AclMode, Scheduler},
    ids::IndexedListener,
    state::{Acl, Policy, State},
};

/// What a listener has besides its schedule; lists and limits are put into `state`.
pub(super) fn policy(listener: &IndexedListener, state: &mut State, inputs: &Inputs<'_>) -> Policy {
    let mut policy = Policy::default();
    if let Some((mode, list)) = &listener.acl {
        policy.flags |= ListenerFlags::GUARDED;
        policy.flags |= match mode {
            AclMode::Allow => ListenerFlags::ALLOW,
            AclMode::Deny => ListenerFlags::DENY,
        };
        policy.acl = number(list, &mut state.acls, &inputs.installed.acls);
    }
    if let Some(limits) = limits(listener) {
        policy.flags |= ListenerFlags::GUARDED | ListenerFlags::LIMITED;
        state.limits.insert(listener.id, limits);
    }
    if let Some(persistence) = listener.persistence {
        policy.sticky_jiffies = inputs.jiffies.from_duration(persistence);
    }
    if listener.persistence.is_some()
        || matches!(listener.scheduler, Scheduler::Wlc | Scheduler::Qch)
    {
        policy.flags |= ListenerFlags::CHOOSES;
    }
    policy
}

/// The number of an access list: that of the same list, or one that no list has.
fn number(
    list: &Arc<Acl>,
    wanted: &mut BTreeMap<u32, Arc<Acl>>,
    installed: &BTreeMap<u32, Arc<Acl>>,
) -> u32 {
    let is_it = |(_, known): &(&u32, &Arc<Acl>)| Arc::ptr_eq(known, list) || *known == list;
    // An empty one has no entries that could tell its number.
    if list.is_empty() {
        return 0;
    }
    let known = wanted.iter().find(is_it).or_else(|| installed.iter().find(is_it));
    let number = known.map(|(number, _)| *number);
    let mut free = (1..).filter(|it| !wanted.contains_key(it) && !installed.contains_key(it));
    let number = number.or_else(|| free.next()).unwrap_or_default();
    wanted.entry(number).or_insert_with(|| Arc::clone(list));
    number
}

/// How far a listener may be ahead of its limits: a tenth of a second's worth.
const BURST_NS: u64 = 100_000_000;
const SECOND_NS: u64 = 1_000_000_000;

fn limits(listener: &IndexedListener) -> Option<Limits> {
    let crate::config::Limits { new_flows, new_flows_per_source, bandwidth } = listener.limits;
    let flow_ns = new_flows.map(|flows| SECOND_NS / u64::from(flows));
    let source_ns = new_flows_per_source.map(|flows| SECOND_NS / u64::from(flows));
    let byte_ns = bandwidth.map(|bits| ((8 * SECOND_NS) << 16) / bits);
    let has_any = flow_ns.is_some() || source_ns.is_some() || byte_ns.is_some();
    has_any.then(|| Limits {
        flow_ns: flow_ns.unwrap_or(0),
        flow_burst: flow_ns.map_or(0, |_| BURST_NS),
        source_ns: source_ns.unwrap_or(0),
        source_burst: source_ns.map_or(0, |_| SECOND_NS),
        byte_ns: byte_ns.unwrap_or(0),
        byte_burst: byte_ns.map_or(0, |_| BURST_NS),
    })
}
