//! What can go wrong with the datapath.

use std::{io, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    pin::PinError,
    programs::{ProgramError, links::LinkError},
};

use super::{BpffsError, TableError, loader::PROGRAM};

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
    #[error(
        "{} is of another layout (key {key}, value {value} bytes, {entries} entries); run `slb unload` \
         with the version that made it",
        path.display()
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// Its key size in bytes.
        key: usize,
        /// Its value size in bytes.
        value: usize,
        /// Its capacity.
        entries: usize,
    },
    /// The object was built from other sources.
    #[error("the eBPF object has no program named {PROGRAM}")]
    NoProgram,
    /// A map could not be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The kernel does not say how long its ticks are.
    #[error("cannot read the kernel's clock")]
    Clock(#[source] io::Error),
    /// The kernel gives no random numbers.
    #[error("cannot draw a seed for the hashes")]
    Seed(#[source] io::Error),
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
    /// Another program is there.
    #[error(
        "{interface}: an XDP program (id {program}) is attached already; it was left alone. See what it is with \
         `bpftool prog show id {program}`. Take it off with `ip link set {interface} xdp off`, or `bpftool link detach` if a \
         link holds it, or take {interface} out of gateway.interfaces"
    )]
    Occupied {
        /// Where.
        interface: String,
        /// The program's id. Its name is told to those who have `CAP_SYS_ADMIN`.
        program: u32,
    },
    /// An `slb` with another layout of the maps is there.
    #[error(
        "{interface}: slb is attached already, with another layout of its maps ({}); `slb unload` \
         removes it, which ends the flows",
        pins.display()
    )]
    OtherLayout {
        /// Where.
        interface: String,
        /// Its pins.
        pins: PathBuf,
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
