//! Loads the embedded object onto the pinned maps.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{Ebpf, EbpfLoader, maps::MapData, programs::Xdp};

use super::{LoadError, Maps, Pins, bpffs, layouts};

/// The program, as compiled by the build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/slb"));

pub(super) const PROGRAM: &str = "slb";

/// Capacities that depend on the configuration. They count when the maps are made, not later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// Of `SLB_FLOWS`, in entries.
    pub flow_entries: u32,
    /// Of `SLB_SLOTS`, in chunks.
    pub chunks: u32,
}

/// A loaded datapath.
pub struct Loaded {
    /// Its maps.
    pub maps: Maps,
    ebpf: Ebpf,
    pub(super) pins: Pins,
    /// What `SLB_FLOWS` really is: capacity in entries, and bytes of kernel memory.
    flows: (u32, u64),
    /// What an operator should know about the place of the pins.
    warning: Option<String>,
}

impl Loaded {
    /// Loads the program onto the pinned maps, making those that are missing. Attaches nothing.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn open(pins: Pins, capacities: Capacities) -> Result<Self, LoadError> {
        let warning = bpffs::ensure(pins.root())?;
        pins.make()?;
        layouts::check(&pins)?;
        let mut loader = EbpfLoader::new();
        for map in layouts::MAPS {
            loader.map_pin_path(map.name, pins.map(map.name));
        }
        loader.map_max_entries("SLB_FLOWS", capacities.flow_entries);
        loader.map_max_entries("SLB_SLOTS", capacities.chunks);
        let mut ebpf = loader.load(OBJECT).map_err(|error| LoadError::Object(Box::new(error)))?;
        #[cfg(feature = "trace")]
        super::trace::start(&mut ebpf);
        let program = program(&mut ebpf)?;
        program.load().map_err(|error| LoadError::Program(Box::new(error)))?;
        let flows = flow_table(&pins)?;
        Ok(Self { maps: Maps::open(&pins)?, ebpf, pins, flows, warning })
    }

    /// Capacity of the flow table in entries (a flow takes two), and its memory in bytes.
    #[must_use]
    pub const fn flow_table(&self) -> (u32, u64) {
        self.flows
    }

    /// What an operator should know about the place of the pins, in words.
    #[must_use]
    pub const fn warning(&self) -> Option<&String> {
        self.warning.as_ref()
    }

    /// The loaded program, for whatever else aya can do with it.
    ///
    /// # Errors
    ///
    /// [`LoadError::NoProgram`] cannot happen after [`Loaded::open`] has succeeded.
    pub fn program(&mut self) -> Result<&mut Xdp, LoadError> {
        program(&mut self.ebpf)
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, LoadError> {
    ebpf.program_mut(PROGRAM)
        .ok_or(LoadError::NoProgram)?
        .try_into()
        .map_err(|error| LoadError::Program(Box::new(error)))
}

fn flow_table(pins: &Pins) -> Result<(u32, u64), LoadError> {
    let name = "SLB_FLOWS";
    let refused = |error| LoadError::Map { name, source: Box::new(error) };
    let map = MapData::from_pin(pins.map(name)).map_err(refused)?;
    let entries = map.info().map_err(refused)?.max_entries();
    let fdinfo = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&fdinfo)
        .map_err(|source| LoadError::Path { path: fdinfo.into(), source })?;
    let bytes = text
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or_default();
    Ok((entries, bytes))
}
