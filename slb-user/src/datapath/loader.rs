//! Loads the embedded object, pins what it makes, and takes over what an earlier agent has pinned.
//!
//! ```text
//! <pins>/v<ABI>/maps/<MAP>         outlive every agent; never replaced
//!              /progs/slb          the program in use
//!              /links/<interface>  keep it attached; a newer program is swapped into them
//! ```

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, MapInfo},
    pin::PinError,
    programs::{
        ProgramError, ProgramInfo, Xdp, XdpMode as AyaMode,
        links::{FdLink, LinkError, PinnedLink},
        xdp::XdpLink,
    },
};
use slb_common::abi::ABI_VERSION;

use super::{BpffsError, Maps, TableError, bpffs};
use crate::{causes::causes, config::XdpMode};

/// The program, as compiled by the build script.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/slb"));

const PROGRAM: &str = "slb";
const MAPS: [&str; 12] = [
    "SLB_LISTENERS",
    "SLB_SLOTS",
    "SLB_CURSORS",
    "SLB_BACKENDS",
    "SLB_ADDRESSES",
    "SLB_ENDPOINTS",
    "SLB_INTERFACES",
    "SLB_SETTINGS",
    "SLB_FLOWS",
    "SLB_VERDICTS",
    "SLB_TRAFFIC",
    "SLB_SCRATCH",
];

/// The datapath could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No place to pin to.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// A directory or pin could not be made or removed.
    #[error("{}", path.display())]
    Path {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused the object. aya puts the verifier's last lines into its message.
    #[error(
        "cannot load the eBPF object; it needs Linux 6.1 with BTF, and CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    )]
    Object(#[source] Box<EbpfError>),
    /// The kernel refused the program.
    #[error("cannot load the XDP program")]
    Program(#[source] Box<ProgramError>),
    /// A pinned map cannot be looked at.
    #[error("pinned map {name}")]
    Map {
        /// Which one.
        name: &'static str,
        /// Why.
        source: Box<MapError>,
    },
    /// A pinned map is not what this version works with.
    #[error("{} is of another layout (key {key}, value {value} bytes); run `slb unload` with the version that made it", path.display())]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Its key size in bytes.
        key: u32,
        /// Its value size in bytes.
        value: u32,
    },
    /// The object was built from other sources.
    #[error("the eBPF object has no program named {PROGRAM}")]
    NoProgram,
    /// A map could not be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A pin failed.
    #[error("cannot pin {}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        source: Box<PinError>,
    },
    /// A pinned link cannot be used.
    #[error("pinned link {}", path.display())]
    Link {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: Box<LinkError>,
    },
    /// There is no such interface.
    #[error("no interface {0}; `ip link` lists those that are there")]
    NoInterface(String),
    /// Somebody else's program is there.
    #[error(
        "{interface}: XDP program '{name}' (id {id}) is attached already; it was left alone. Take it \
         off with `ip link set {interface} xdp off`, or `bpftool link detach` if a link holds it, or \
         take {interface} out of gateway.interfaces"
    )]
    Occupied {
        /// Where.
        interface: String,
        /// The program's name.
        name: String,
        /// The program's id.
        id: u32,
    },
    /// The driver refused.
    #[error("{interface}: cannot attach XDP in {mode} mode")]
    Attach {
        /// Where.
        interface: String,
        /// `native` or `generic`.
        mode: &'static str,
        /// Why.
        source: Box<ProgramError>,
    },
}

/// Where everything is pinned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Below `root`, the configuration's `gateway.pins`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    fn version(&self) -> PathBuf {
        self.root.join(format!("v{ABI_VERSION}"))
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.version().join("maps").join(name)
    }

    fn program(&self) -> PathBuf {
        self.version().join("progs").join(PROGRAM)
    }

    fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    fn link(&self, interface: &str) -> PathBuf {
        self.links().join(interface)
    }
}

/// Capacities that depend on the configuration. They count when the maps are made, not later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// Of `SLB_FLOWS`, in entries.
    pub flow_entries: u32,
    /// Of `SLB_SLOTS`, in chunks.
    pub chunks: u32,
}

/// How XDP is attached to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// `native` or `generic`.
    pub mode: &'static str,
    /// Why, if the mode was not the first choice.
    pub reason: Option<String>,
}

/// A loaded datapath.
pub struct Loaded {
    /// Its maps.
    pub maps: Maps,
    ebpf: Ebpf,
    pins: Pins,
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
        let warning = bpffs::ensure(&pins.root)?;
        for directory in ["maps", "progs", "links"] {
            let path = pins.version().join(directory);
            fs::create_dir_all(&path).map_err(|source| LoadError::Path { path, source })?;
        }
        check_layouts(&pins)?;
        let mut loader = EbpfLoader::new();
        for name in MAPS {
            loader.map_pin_path(name, pins.map(name));
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

    /// Attaches the program to `interface`, or puts it into the link that is pinned for it.
    ///
    /// `attached` is the id of the XDP program that the interface has now.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; a program of somebody else is left alone.
    pub fn attach(
        &mut self,
        interface: &str,
        mode: XdpMode,
        attached: Option<u32>,
    ) -> Result<Option<Attachment>, LoadError> {
        let path = self.pins.link(interface);
        if path.exists() {
            let pinned = open_link(&path)?;
            let ours = pinned.program;
            if attached == Some(ours) {
                self.replace(&path, pinned)?;
                return Ok(None);
            }
            // The interface was deleted and made again: the link holds on to nothing.
            remove(&path)?;
        }
        if let Some(id) = attached {
            return Err(LoadError::Occupied {
                interface: interface.to_owned(),
                name: program_name(id),
                id,
            });
        }
        let (link, attachment) = self.attach_first(interface, mode)?;
        link.pin(&path)
            .map_err(|error| LoadError::Pin { path: path.clone(), source: Box::new(error) })?;
        self.pin_program()?;
        Ok(Some(attachment))
    }

    /// Swaps this program into a pinned link, unless the very same is there.
    fn replace(&mut self, path: &Path, pinned: OpenLink) -> Result<(), LoadError> {
        let refused = |error| LoadError::Program(Box::new(error));
        let program = program(&mut self.ebpf)?;
        let info = program.info().map_err(refused)?;
        if is_same_program(&info, &self.pins.program(), pinned.program).map_err(refused)? {
            return Ok(());
        }
        let link: XdpLink = FdLink::from(pinned.link)
            .try_into()
            .map_err(|error| LoadError::Link { path: path.to_owned(), source: Box::new(error) })?;
        let id = program.attach_to_link(link).map_err(refused)?;
        // Owned by its pin, not by this process.
        drop(program.take_link(id).map_err(refused)?);
        tracing::info!(link = %path.display(), program = info.id(), was = pinned.program, "replaced the XDP program");
        self.pin_program()
    }

    fn attach_first(
        &mut self,
        interface: &str,
        mode: XdpMode,
    ) -> Result<(FdLink, Attachment), LoadError> {
        match mode {
            XdpMode::Native => self.attach_as(interface, AyaMode::Driver, "native", None),
            XdpMode::Generic => self.attach_as(interface, AyaMode::Skb, "generic", None),
            XdpMode::Auto => match self.attach_as(interface, AyaMode::Driver, "native", None) {
                Err(LoadError::Attach { source, .. }) => {
                    let reason = format!("native mode refused: {}", causes(&*source));
                    self.attach_as(interface, AyaMode::Skb, "generic", Some(reason))
                }
                other => other,
            },
        }
    }

    fn attach_as(
        &mut self,
        interface: &str,
        mode: AyaMode,
        name: &'static str,
        reason: Option<String>,
    ) -> Result<(FdLink, Attachment), LoadError> {
        let refused = |error: ProgramError| match error {
            ProgramError::UnknownInterface { name } => LoadError::NoInterface(name),
            error => LoadError::Attach {
                interface: interface.to_owned(),
                mode: name,
                source: Box::new(error),
            },
        };
        let program = program(&mut self.ebpf)?;
        let id = program.attach(interface, mode).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        // A netlink attachment, aya's fall-back, would end with this process; kernels that this
        // program loads on have links.
        let link = FdLink::try_from(link).map_err(|error| LoadError::Link {
            path: self.pins.link(interface),
            source: Box::new(error),
        })?;
        Ok((link, Attachment { mode: name, reason }))
    }

    fn pin_program(&mut self) -> Result<(), LoadError> {
        let path = self.pins.program();
        if path.exists() {
            remove(&path)?;
        }
        let program = program(&mut self.ebpf)?;
        program.pin(&path).map_err(|error| LoadError::Pin { path, source: Box::new(error) })
    }

    /// Detaches from the interfaces that are not in `wanted`.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn detach_others(&self, wanted: &[String]) -> Result<(), LoadError> {
        for (name, path) in entries(&self.pins.links())? {
            if !wanted.contains(&name) {
                remove(&path)?;
                tracing::info!(interface = name, "detached XDP");
            }
        }
        Ok(())
    }
}

/// Detaches XDP everywhere and removes every pin below `pins`, of all versions.
///
/// # Errors
///
/// [`LoadError`]. Nothing being there is none.
pub fn unload(pins: &Pins) -> Result<Vec<PathBuf>, LoadError> {
    let mut removed = Vec::new();
    for (name, version) in entries(&pins.root)? {
        let is_ours = name.strip_prefix('v').is_some_and(|rest| rest.parse::<u32>().is_ok());
        if !is_ours {
            continue;
        }
        // Links first: from here on the kernel has the packets again.
        for directory in ["links", "progs", "maps"] {
            let directory = version.join(directory);
            for (_, path) in entries(&directory)? {
                remove(&path)?;
                removed.push(path);
            }
            remove_directory(&directory)?;
        }
        remove_directory(&version)?;
    }
    Ok(removed)
}

/// A pinned link, and the id of the program in it.
struct OpenLink {
    link: PinnedLink,
    program: u32,
}

fn open_link(path: &Path) -> Result<OpenLink, LoadError> {
    let broken = |error| LoadError::Link { path: path.to_owned(), source: Box::new(error) };
    let link = PinnedLink::from_pin(path).map_err(broken)?;
    let link = FdLink::from(link);
    let program = link.info().map_err(broken)?.program_id();
    // Opened again, since the conversion above cannot be undone.
    let link = PinnedLink::from_pin(path).map_err(broken)?;
    Ok(OpenLink { link, program })
}

/// Whether the pinned program is the one with this id, and does the same as the one described by
/// `new`: the same instructions on the same maps.
///
/// Through the pin, because looking up a program by its id takes `CAP_SYS_ADMIN`.
fn is_same_program(new: &ProgramInfo, pin: &Path, id: u32) -> Result<bool, ProgramError> {
    let old = match ProgramInfo::from_pin(pin) {
        Ok(old) if old.id() == id => old,
        _ => return Ok(false),
    };
    let sorted = |info: &ProgramInfo| -> Result<_, ProgramError> {
        let mut ids = info.map_ids()?.unwrap_or_default();
        ids.sort_unstable();
        Ok(ids)
    };
    Ok(old.tag() == new.tag() && sorted(&old)? == sorted(new)?)
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, LoadError> {
    ebpf.program_mut(PROGRAM)
        .ok_or(LoadError::NoProgram)?
        .try_into()
        .map_err(|error| LoadError::Program(Box::new(error)))
}

fn program_name(id: u32) -> String {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .find(|info| info.id() == id)
        .and_then(|info| info.name_as_str().map(str::to_owned))
        .unwrap_or_default()
}

/// Compares the pinned maps with those in the object: opening a pin validates nothing.
fn check_layouts(pins: &Pins) -> Result<(), LoadError> {
    let object = layouts();
    for name in MAPS {
        let path = pins.map(name);
        if !path.exists() {
            continue;
        }
        let info = MapInfo::from_pin(&path)
            .map_err(|error| LoadError::Map { name, source: Box::new(error) })?;
        let found = (info.key_size(), info.value_size());
        if object.get(name) != Some(&found) {
            return Err(LoadError::Layout { path, key: found.0, value: found.1 });
        }
    }
    Ok(())
}

/// Key and value size of each map, as this version defines them.
fn layouts() -> BTreeMap<&'static str, (u32, u32)> {
    use slb_common::abi;
    fn sizes<K, V>() -> (u32, u32) {
        (size_of::<K>() as u32, size_of::<V>() as u32)
    }
    BTreeMap::from([
        ("SLB_LISTENERS", sizes::<abi::Endpoint, abi::Listener>()),
        ("SLB_SLOTS", sizes::<u32, abi::Chunk>()),
        ("SLB_CURSORS", sizes::<u32, u64>()),
        ("SLB_BACKENDS", sizes::<u32, abi::Backend>()),
        ("SLB_ADDRESSES", sizes::<abi::Address, abi::Roles>()),
        ("SLB_ENDPOINTS", sizes::<abi::Endpoint, abi::DirectEndpoint>()),
        ("SLB_INTERFACES", sizes::<u32, abi::Interface>()),
        ("SLB_SETTINGS", sizes::<u32, abi::Settings>()),
        ("SLB_FLOWS", sizes::<abi::FlowKey, abi::Flow>()),
        ("SLB_VERDICTS", sizes::<u32, abi::Counter>()),
        ("SLB_TRAFFIC", sizes::<u32, abi::Traffic>()),
        ("SLB_SCRATCH", sizes::<u32, abi::Flow>()),
    ])
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

fn entries(directory: &Path) -> Result<Vec<(String, PathBuf)>, LoadError> {
    let failed = |source| LoadError::Path { path: directory.to_owned(), source };
    match fs::read_dir(directory) {
        Ok(entries) => entries
            .map(|entry| {
                let entry = entry.map_err(failed)?;
                Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
            })
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

fn remove(path: &Path) -> Result<(), LoadError> {
    fs::remove_file(path).map_err(|source| LoadError::Path { path: path.to_owned(), source })
}

fn remove_directory(path: &Path) -> Result<(), LoadError> {
    match fs::remove_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(LoadError::Path { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
