//! What is pinned, read without the agent.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
    programs::{
        ProgramInfo,
        links::{FdLink, PinnedLink},
    },
};
use slb_common::abi::{
    ABI_VERSION, Address, Backend, Chunk, Endpoint, Interface, Listener, RevNat, Roles,
    SLOT_BACKEND,
};
use slb_lab::{Gateway, topology};
use slb_user::datapath::Batch;

/// Everything that an agent writes because of its configuration and of the network.
#[derive(PartialEq)]
pub(crate) struct Contents {
    pub listeners: BTreeMap<Endpoint, Listener>,
    pub slots: Vec<Chunk>,
    pub backends: Vec<Backend>,
    pub addresses: BTreeMap<Address, Roles>,
    pub endpoints: BTreeMap<Endpoint, RevNat>,
    pub interfaces: BTreeMap<u32, Interface>,
}

impl Contents {
    pub(crate) fn read(gateway: &Gateway) -> Self {
        Self {
            listeners: hash(gateway, "SLB_LISTENERS"),
            slots: array(gateway, "SLB_SLOTS"),
            backends: backends(gateway),
            addresses: hash(gateway, "SLB_ADDRESSES"),
            endpoints: hash(gateway, "SLB_REVNAT"),
            interfaces: hash(gateway, "SLB_INTERFACES"),
        }
    }

    /// The maps that are not as in `other`.
    pub(crate) fn differences(&self, other: &Self) -> Vec<&'static str> {
        [
            ("SLB_LISTENERS", self.listeners == other.listeners),
            ("SLB_SLOTS", self.slots == other.slots),
            ("SLB_BACKENDS", self.backends == other.backends),
            ("SLB_ADDRESSES", self.addresses == other.addresses),
            ("SLB_REVNAT", self.endpoints == other.endpoints),
            ("SLB_INTERFACES", self.interfaces == other.interfaces),
        ]
        .into_iter()
        .filter_map(|(name, same)| (!same).then_some(name))
        .collect()
    }
}

pub(crate) fn backends(gateway: &Gateway) -> Vec<Backend> {
    array(gateway, "SLB_BACKENDS")
}

/// The backends that the first slots of a listener lead to.
pub(crate) fn chosen(gateway: &Gateway, endpoint: Endpoint) -> Vec<Backend> {
    let listeners: BTreeMap<Endpoint, Listener> = hash(gateway, "SLB_LISTENERS");
    let listener = listeners[&endpoint];
    let slots: Vec<Chunk> = array(gateway, "SLB_SLOTS");
    let backends = backends(gateway);
    let chunk = &slots[listener.first_chunk as usize];
    let slots = chunk.slots.iter().take(listener.slots as usize);
    slots.map(|slot| backends[(slot & SLOT_BACKEND) as usize]).collect()
}

/// The first element of `SLB_SLOTS` that is in use.
pub(crate) fn first_chunk(gateway: &Gateway) -> u32 {
    let listeners: BTreeMap<Endpoint, Listener> = hash(gateway, "SLB_LISTENERS");
    listeners.values().find(|it| it.slots > 0).unwrap().first_chunk
}

/// Where everything of this version is pinned.
pub(crate) fn version(gateway: &Gateway) -> PathBuf {
    gateway.pins().join(format!("v{ABI_VERSION}"))
}

/// The names in a directory, sorted, without those that every bpffs has at its root.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !name.ends_with(".debug"));
    names.sort();
    names
}

/// The pinned link of each interface.
pub(crate) fn links(gateway: &Gateway) -> Vec<PathBuf> {
    topology::INTERFACES.iter().map(|name| version(gateway).join("links").join(name)).collect()
}

/// The ids of the programs in the links, then that of the pinned program.
pub(crate) fn programs(gateway: &Gateway) -> Vec<u32> {
    let in_links = links(gateway)
        .into_iter()
        .map(|path| FdLink::from(PinnedLink::from_pin(path).unwrap()).info().unwrap().program_id());
    let pinned = ProgramInfo::from_pin(version(gateway).join("progs/slb")).unwrap().id();
    in_links.chain([pinned]).collect()
}

/// The hash of the pinned program's instructions.
pub(crate) fn tag(gateway: &Gateway) -> u64 {
    ProgramInfo::from_pin(version(gateway).join("progs/slb")).unwrap().tag()
}

fn open(gateway: &Gateway, name: &str) -> Map {
    Map::from_map_data(data(gateway, name)).unwrap()
}

fn data(gateway: &Gateway, name: &str) -> MapData {
    MapData::from_pin(version(gateway).join("maps").join(name)).unwrap()
}

/// Overwrites the first element of an array with zeros.
pub(crate) fn zero_first(gateway: &Gateway, name: &str) {
    /// `BPF_MAP_UPDATE_BATCH` of `linux/bpf.h`.
    const UPDATE_BATCH: libc::c_long = 26;
    let map = data(gateway, name);
    let value = vec![0_u8; map.info().unwrap().value_size() as usize];
    let batch = Batch {
        keys: (&raw const FIRST).expose_provenance() as u64,
        values: value.as_ptr().expose_provenance() as u64,
        count: 1,
        map: map.fd().as_fd().as_raw_fd() as u32,
        ..Batch::default()
    };
    // SAFETY: the kernel reads one key and one value, as long as the map's are.
    let done = unsafe { libc::syscall(libc::SYS_bpf, UPDATE_BATCH, &batch, size_of::<Batch>()) };
    assert_eq!(done, 0, "{name}: {}", io::Error::last_os_error());
}

static FIRST: u32 = 0;

fn hash<K: Pod + Ord, V: Pod>(gateway: &Gateway, name: &str) -> BTreeMap<K, V> {
    let map: HashMap<MapData, K, V> = open(gateway, name).try_into().unwrap();
    map.iter().collect::<Result<_, _>>().unwrap()
}

fn array<V: Pod>(gateway: &Gateway, name: &str) -> Vec<V> {
    let map: Array<MapData, V> = open(gateway, name).try_into().unwrap();
    map.iter().collect::<Result<_, _>>().unwrap()
}
