//! The layout of each pinned map, which must be that of this version.

use aya::maps::{MapInfo, lpm_trie::Key};
use slb_common::{
    abi::{
        AclCacheEntry, Address, Backend, Bucket, Chunk, ClientNextHop, Counter, Endpoint, Filter,
        Fragment, FragmentKey, Interface, Limits, Listed, Listener, ListenerIndex, MAX_ACL_CACHE,
        MAX_BACKENDS, MAX_ENDPOINTS, MAX_FRAGMENTS, MAX_INGRESS, MAX_INTERFACES, MAX_LISTENERS,
        MAX_MACS, MAX_NEXT_HOPS, MAX_PREFIXES, MAX_QUIC, MAX_SOURCE_POLICERS, MAX_SOURCES,
        MAX_STICKY, MAX_SUBNETS, OwnMac, Policers, QuicKey, RevNat, RevNatIndex, Roles, Scratch,
        Settings, SourcePolicer, Sticky, StickyKey, Subnet, SynAnswers, Traffic, VLAN_WORDS,
    },
    programs::Program,
    verdict::MAX_VERDICTS,
};

use super::{LoadError, Pins};

/// A map as this version defines it.
pub(super) struct MapLayout {
    pub name: &'static str,
    key: usize,
    value: usize,
    /// `None`: up to the configuration.
    capacity: Option<usize>,
}

const fn layout<K, V>(name: &'static str, capacity: Option<usize>) -> MapLayout {
    MapLayout { name, key: size_of::<K>(), value: size_of::<V>(), capacity }
}

/// All of them.
pub(super) const MAPS: [MapLayout; 33] = [
    layout::<Endpoint, Listener>("SLB_LISTENERS", Some(MAX_LISTENERS)),
    layout::<u32, ListenerIndex>("SLB_LISTENER_INDEX", Some(1)),
    layout::<u32, RevNatIndex>("SLB_REVNAT_INDEX", Some(1)),
    layout::<u32, Chunk>("SLB_SLOTS", None),
    layout::<u32, u64>("SLB_RR_CURSORS", Some(MAX_LISTENERS)),
    layout::<u32, Backend>("SLB_BACKENDS", Some(MAX_BACKENDS)),
    layout::<Address, Roles>("SLB_ADDRESSES", Some(MAX_ENDPOINTS)),
    layout::<Endpoint, RevNat>("SLB_REVNAT", Some(MAX_ENDPOINTS)),
    layout::<u32, Interface>("SLB_INTERFACES", Some(MAX_INTERFACES)),
    layout::<u32, Interface>("SLB_INGRESS", Some(MAX_INGRESS)),
    layout::<OwnMac, u32>("SLB_MACS", Some(MAX_MACS)),
    layout::<Key<Subnet>, u64>("SLB_SUBNETS", Some(MAX_SUBNETS)),
    layout::<u32, u64>("SLB_VLANS", Some(VLAN_WORDS)),
    layout::<u32, Settings>("SLB_SETTINGS", Some(1)),
    layout::<u32, Filter>("SLB_FILTER", Some(1)),
    layout::<u32, ClientNextHop>("SLB_NEXT_HOPS", Some(MAX_NEXT_HOPS)),
    layout::<u32, Bucket>("SLB_FLOWS", None),
    layout::<u32, u32>("SLB_BYPASS", Some(MAX_BACKENDS)),
    layout::<u32, Counter>("SLB_VERDICTS", Some(MAX_VERDICTS)),
    layout::<u32, Traffic>("SLB_TRAFFIC", Some(MAX_BACKENDS)),
    layout::<u32, u64>("SLB_ACTIVE", Some(MAX_BACKENDS)),
    layout::<u32, SynAnswers>("SLB_PASSIVE_HC", Some(MAX_BACKENDS)),
    layout::<StickyKey, Sticky>("SLB_STICKY", Some(MAX_STICKY)),
    layout::<Key<Listed>, u32>("SLB_ACL", Some(MAX_PREFIXES)),
    layout::<u32, AclCacheEntry>("SLB_ACL_CACHE", Some(MAX_ACL_CACHE)),
    layout::<QuicKey, u32>("SLB_QUIC", Some(MAX_QUIC)),
    layout::<u32, Limits>("SLB_LIMITS", Some(MAX_LISTENERS)),
    layout::<u32, Policers>("SLB_POLICERS", Some(MAX_LISTENERS)),
    layout::<u32, SourcePolicer>("SLB_SRC_POLICER", Some(MAX_SOURCE_POLICERS)),
    layout::<u32, Address>("SLB_SOURCES", Some(MAX_SOURCES)),
    layout::<FragmentKey, Fragment>("SLB_FRAGMENTS", Some(MAX_FRAGMENTS)),
    layout::<u32, u32>("SLB_PROGRAMS", Some(Program::ALL.len())),
    layout::<u32, Scratch>("SLB_SCRATCH", Some(1)),
];

/// Compares the pinned maps with those of this version: opening a pin validates nothing.
pub(super) fn check(pins: &Pins) -> Result<(), LoadError> {
    for MapLayout { name, key, value, capacity } in MAPS {
        let path = pins.map(name);
        if !path.exists() {
            continue;
        }
        let info = MapInfo::from_pin(&path)
            .map_err(|error| LoadError::Map { name, source: Box::new(error) })?;
        let found = (info.key_size() as usize, info.value_size() as usize);
        let entries = info.max_entries() as usize;
        if found != (key, value) || capacity.is_some_and(|capacity| capacity != entries) {
            return Err(LoadError::Layout { path, key: found.0, value: found.1, entries });
        }
    }
    Ok(())
}
