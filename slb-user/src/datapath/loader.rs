//! Loads the embedded object onto the pinned maps.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapError, ProgramArray},
    programs::Xdp,
};
use aya_obj::programs::XdpAttachType;
use slb_common::{
    abi::{BUCKET_FLOWS, EPOCH_LEARNED, PLACES_PER_FLOW},
    programs::Program,
};

use super::{
    FlowTable, KeptMaps, LoadError, Maps, Pins,
    bpffs::{self, Mounted},
    links::HeldLink,
    map_check,
    pins::{pin_again, remove},
};
use crate::{
    clock::Jiffies,
    rights::{FILES, LOAD},
    seed,
};

/// The program, as compiled by the build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/slb"));

/// The program of `slb decap`.
pub static DECAP: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/decap"));

/// What `cargo xtask bench` puts before the programs that it times.
pub static PRELUDE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/prelude"));

pub(super) const PROGRAM: &str = "slb";

/// Capacities that depend on the configuration. They count when the maps are made, not later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// Flows that `SLB_FLOWS` has room for.
    pub flows: u32,
    /// Of `SLB_SLOTS`, in chunks.
    pub chunks: u32,
}

/// A loaded datapath.
pub struct Loaded {
    /// Its maps.
    pub maps: Maps,
    /// Its flow table.
    pub table: FlowTable,
    /// Its maps, to be read beside the agent's loop.
    pub kept: Arc<KeptMaps>,
    programs: Programs,
    /// Where the programs are pinned by the object that they come from.
    object_pin: PathBuf,
    capacities: Capacities,
    /// The links that hold the program at interfaces, by the name of these.
    pub(super) links: BTreeMap<String, HeldLink>,
    pub(super) pins: Pins,
    /// What `SLB_FLOWS` really is: capacity in flows, and bytes of kernel memory.
    flows: (u32, u64),
    /// What an operator should know about the place of the pins.
    warning: Option<String>,
}

/// Gives new maps their seeds. Those that are there stay: flows were placed by them.
fn set_seeds(maps: &mut Maps) -> Result<(), LoadError> {
    let settings = maps.settings();
    if !settings.table_seed.is_set() {
        let drawn = seed::random().map_err(LoadError::Seed)?;
        maps.set(|settings| settings.table_seed = drawn)?;
    }
    if !settings.seed.is_set() {
        let directory = seed::state_directory();
        let own = seed::of_installation(directory.as_deref()).map_err(LoadError::Seed)?;
        maps.set(|settings| settings.seed = own)?;
    }
    Ok(())
}

impl Loaded {
    /// Loads the programs onto the pinned maps, making those that are missing, unless an earlier agent has done
    /// so with the same object. Attaches nothing.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn open(pins: Pins, capacities: Capacities) -> Result<Self, LoadError> {
        Self::open_object(OBJECT, pins, capacities)
    }

    /// The same with another build of the object.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn open_object(
        object: &[u8],
        pins: Pins,
        capacities: Capacities,
    ) -> Result<Self, LoadError> {
        let _raised = FILES.raise();
        let mounted = bpffs::ensure(pins.root())?.or_else(|| pins.mounted().cloned());
        if let Some(Mounted { at, .. }) = &mounted {
            tracing::info!(path = %at.display(), "mounted bpffs");
        }
        let warning = mounted.and_then(|mounted| mounted.warning());
        pins.make()?;
        map_check::check(&pins)?;
        let programs = match Programs::reuse(object, &pins)? {
            Some(programs) => programs,
            None => Programs::load(object, &pins, capacities)?,
        };
        let flows = flow_table(&pins)?;
        let mut maps = Maps::open(&pins)?;
        let jiffies = Jiffies::from_kernel().map_err(LoadError::Clock)?;
        set_seeds(&mut maps)?;
        maps.set(|settings| {
            settings.buckets = flows.0 / FLOWS_PER_BUCKET;
            settings.opening_jiffies = jiffies.from_duration(OPENING);
            settings.closing_jiffies = jiffies.from_duration(CLOSING);
            settings.fragment_jiffies = jiffies.from_duration(FRAGMENTS);
            settings.route_epoch = settings.route_epoch.max(EPOCH_LEARNED + 1);
            settings.acl_epoch = settings.acl_epoch.max(1);
        })?;
        Ok(Self {
            maps,
            table: FlowTable::open(&pins)?,
            kept: Arc::new(KeptMaps::open(&pins)?),
            programs,
            object_pin: pins.program_of(object),
            capacities,
            links: BTreeMap::new(),
            pins,
            flows,
            warning,
        })
    }

    /// Capacity of the flow table in flows, and its memory in bytes.
    #[must_use]
    pub const fn flow_table(&self) -> (u32, u64) {
        self.flows
    }

    /// What an operator should know about the place of the pins, in words.
    #[must_use]
    pub const fn warning(&self) -> Option<&String> {
        self.warning.as_ref()
    }

    /// The loaded program, for other uses of aya.
    ///
    /// # Errors
    ///
    /// [`LoadError::NoProgram`] cannot happen after [`Loaded::open`] has succeeded.
    pub fn program(&mut self) -> Result<&mut Xdp, LoadError> {
        match &mut self.programs {
            Programs::Loaded(ebpf) => program(ebpf, PROGRAM),
            Programs::Pinned(program) => Ok(program),
        }
    }
}

/// Which pins were made again.
#[derive(Debug, Default)]
pub struct Restored {
    /// Relative to the directory of the version.
    pub pins: Vec<String>,
    /// The configuration's `gateway.pins` was not there.
    pub is_new: bool,
}

impl Loaded {
    /// Makes the pins again that another program has removed, of what this process holds.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn restore_pins(&mut self) -> Result<Restored, LoadError> {
        let _raised = FILES.raise();
        let mut restored = Restored { is_new: !self.pins.root().exists(), ..Restored::default() };
        bpffs::ensure(self.pins.root())?;
        self.pins.make()?;
        restored.pins.extend(self.kept.pin(&self.pins)?);
        let programs = [self.object_pin.clone(), self.pins.program()];
        // The second is made when the program is first attached.
        let count = if self.links.is_empty() { 1 } else { 2 };
        for path in programs.into_iter().take(count) {
            let program = self.program()?;
            let fd = program.fd().map_err(|error| LoadError::Program(Box::new(error)))?;
            if pin_again(fd.as_fd(), &path)? {
                restored.pins.push(PROGRAM.to_owned());
            }
        }
        for (interface, held) in &self.links {
            if pin_again(held.link.as_fd(), &self.pins.link(interface))? {
                restored.pins.push(interface.clone());
            }
        }
        Ok(restored)
    }

    /// Whether another program has changed `SLB_PROGRAMS`.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn has_other_programs(&self) -> Result<bool, LoadError> {
        Ok(self.kept.has_other_programs()?)
    }

    /// Loads the programs again. That takes the kernel most of a second, but without them packets are lost.
    ///
    /// All pins have to be there.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn restore_programs(&mut self) -> Result<(), LoadError> {
        self.programs = Programs::load(OBJECT, &self.pins, self.capacities)?;
        self.object_pin = self.pins.program_of(OBJECT);
        self.kept = Arc::new(KeptMaps::open(&self.pins)?);
        Ok(())
    }
}

/// The programs of an object, in the kernel.
///
/// To load them takes the kernel most of a second, so an agent that starts again takes what is pinned. The
/// first program has a pin that is named by a hash of the object that it comes from. An agent that loads
/// another object removes the pin, puts its own programs behind the first, and pins its own first program: so
/// if there is a pin with the hash of an object, there are pins of all its programs.
enum Programs {
    /// With what its log is read through.
    Loaded(Ebpf),
    /// The first one; the others are in `SLB_PROGRAMS`.
    Pinned(Box<Xdp>),
}

impl Programs {
    /// Those that an earlier agent has loaded from the same object.
    fn reuse(object: &[u8], pins: &Pins) -> Result<Option<Self>, LoadError> {
        let pin = pins.program_of(object);
        let is_complete =
            pin.exists() && map_check::MAPS.iter().all(|map| pins.map(map.name).exists());
        // Its log is read through what the loader returns.
        if !is_complete || cfg!(feature = "trace") {
            return Ok(None);
        }
        let program = Self::pinned(&pin)?;
        tracing::info!(pin = %pin.display(), "programs are loaded already");
        Ok(Some(program))
    }

    /// Loads them onto the pinned maps, making those that are missing.
    fn load(object: &[u8], pins: &Pins, capacities: Capacities) -> Result<Self, LoadError> {
        let _raised = LOAD.raise();
        let mut loader = EbpfLoader::new();
        for map in map_check::MAPS {
            loader.map_pin_path(map.name, pins.map(map.name));
        }
        loader.map_max_entries("SLB_FLOWS", buckets_for(capacities.flows));
        loader.map_max_entries("SLB_SLOTS", capacities.chunks);
        let mut ebpf = loader.load(object).map_err(|error| LoadError::Object(Box::new(error)))?;
        #[cfg(feature = "trace")]
        super::trace::start(&mut ebpf);
        let symbols = Program::ALL.iter().map(|program| program.symbol());
        for name in symbols.chain([PROGRAM]) {
            let loaded = program(&mut ebpf, name)?.load();
            loaded.map_err(|error| LoadError::Program(Box::new(error)))?;
        }
        for pin in pins.programs_of_objects()? {
            remove(&pin)?;
        }
        put_programs(&mut ebpf)?;
        let pin = pins.program_of(object);
        program(&mut ebpf, PROGRAM)?
            .pin(&pin)
            .map_err(|error| LoadError::Pin { path: pin.clone(), source: Box::new(error) })?;
        if cfg!(feature = "trace") {
            return Ok(Self::Loaded(ebpf));
        }
        // The loader has a descriptor of each map and program, which have pins.
        Self::pinned(&pin)
    }

    fn pinned(pin: &Path) -> Result<Self, LoadError> {
        let program = Xdp::from_pin(pin, XdpAttachType::Interface);
        let program = program.map_err(|error| LoadError::Program(Box::new(error)))?;
        Ok(Self::Pinned(Box::new(program)))
    }
}

/// A connection that is not established by then never will be: RFC 9293, section 3.8.3, has hosts try
/// for three minutes, but the first minute has nearly all of the attempts.
const OPENING: Duration = Duration::from_secs(60);
/// Late packets of a connection that both sides have closed still find their backend.
const CLOSING: Duration = Duration::from_secs(10);
/// As long as Linux waits for fragments (`net.ipv4.ipfrag_time`).
const FRAGMENTS: Duration = Duration::from_secs(30);
const FLOWS_PER_BUCKET: u32 = (BUCKET_FLOWS / PLACES_PER_FLOW) as u32;

/// How many buckets a table for so many flows has.
const fn buckets_for(flows: u32) -> u32 {
    flows.div_ceil(FLOWS_PER_BUCKET)
}

/// Puts the programs behind the first into their slots. An older first program that is attached tail-calls the
/// newer ones there: what they hand over is part of the ABI.
fn put_programs(ebpf: &mut Ebpf) -> Result<(), LoadError> {
    let name = "SLB_PROGRAMS";
    let refused = |error: MapError| LoadError::Map { name, source: Box::new(error) };
    // No program is loaded after this, so that none misses the map.
    let map = ebpf.take_map(name).ok_or(LoadError::NoProgram)?;
    let mut programs = ProgramArray::try_from(map).map_err(refused)?;
    for &slot in Program::ALL {
        let loaded = program(ebpf, slot.symbol())?;
        let fd = loaded.fd().map_err(|error| LoadError::Program(Box::new(error)))?;
        programs.set(slot as u32, fd, 0).map_err(refused)?;
    }
    Ok(())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp, LoadError> {
    ebpf.program_mut(name)
        .ok_or(LoadError::NoProgram)?
        .try_into()
        .map_err(|error| LoadError::Program(Box::new(error)))
}

fn flow_table(pins: &Pins) -> Result<(u32, u64), LoadError> {
    let name = "SLB_FLOWS";
    let refused = |error| LoadError::Map { name, source: Box::new(error) };
    let map = pins.open_map(name).map_err(refused)?;
    let buckets = map.info().map_err(refused)?.max_entries();
    let fdinfo = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = fs::read_to_string(&fdinfo)
        .map_err(|source| LoadError::Path { path: fdinfo.into(), source })?;
    let bytes = text
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or_default();
    Ok((buckets * FLOWS_PER_BUCKET, bytes))
}
