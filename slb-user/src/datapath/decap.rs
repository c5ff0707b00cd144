//! The backend's side of tunnels: one program per interface that takes packets out of them.
//!
//! ```text
//! <pins>/decap/SLB_DECAP      counters of all interfaces
//!             /<interface>    the link that keeps the program attached
//! ```

use std::{
    fs,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, PerCpuArray},
    programs::{
        Xdp, XdpMode as AyaMode,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
};
use slb_common::abi::{Counter, DECAP_DROPPED, DECAP_OPENED, DECAP_PASSED};

use super::{
    Attachment, LoadError, bpffs,
    loader::DECAP,
    pins::{self, entries, remove},
};
use crate::{
    config::XdpMode,
    error_chain::error_chain,
    net::{GENERIC, NATIVE},
};

const PROGRAM: &str = "slb_decap";
const COUNTERS: &str = "SLB_DECAP";

/// Where a backend's programs are pinned.
#[derive(Clone, Debug)]
pub struct Decap {
    directory: PathBuf,
}

/// What became of frames, on all interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decapsulated {
    /// They were in no tunnel, and were left alone.
    pub passed: Counter,
    /// Taken out of a tunnel.
    pub opened: Counter,
    /// Dropped: marked on their way, which their sender does not understand.
    pub dropped: Counter,
}

impl Decap {
    /// Below `pins`, a directory on bpffs.
    #[must_use]
    pub fn new(pins: &Path) -> Self {
        Self { directory: pins.join("decap") }
    }

    fn link(&self, interface: &str) -> PathBuf {
        self.directory.join(pins::link(interface))
    }

    /// The interfaces that packets are taken out of tunnels on.
    ///
    /// # Errors
    ///
    /// [`LoadError::Path`].
    pub fn interfaces(&self) -> Result<Vec<String>, LoadError> {
        let mut found: Vec<String> = entries(&self.directory)?
            .into_iter()
            .map(|(name, _)| pins::interface(&name))
            .filter(|name| name != COUNTERS)
            .collect();
        found.sort();
        Ok(found)
    }

    /// Attaches the program, or this version of it in place of another. It stays when this process ends.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn attach(&self, interface: &str, mode: XdpMode) -> Result<Attachment, LoadError> {
        if let Some(pins) = self.directory.parent() {
            bpffs::ensure(pins)?;
        }
        fs::create_dir_all(&self.directory)
            .map_err(|source| LoadError::Path { path: self.directory.clone(), source })?;
        let mut ebpf = EbpfLoader::new()
            .map_pin_path(COUNTERS, self.directory.join(COUNTERS))
            .load(DECAP)
            .map_err(|error| LoadError::Object(Box::new(error)))?;
        let program = program(&mut ebpf)?;
        program.load().map_err(|error| LoadError::Program(Box::new(error)))?;
        let path = self.link(interface);
        if path.exists() {
            let broken = |error| LoadError::Link { path: path.clone(), source: Box::new(error) };
            let link = FdLink::from(PinnedLink::from_pin(&path).map_err(broken)?);
            let replaced = XdpLink::try_from(link)
                .map_err(broken)
                .map(|link| program.attach_to_link(link).and_then(|id| program.take_link(id)));
            if let Ok(Ok(_)) = replaced {
                let reason = Some("attached before".to_owned());
                return Ok(Attachment { mode: "same", reason });
            }
            // Of an interface that was deleted and made again.
            remove(&path)?;
        }
        let modes: &[(AyaMode, &'static str)] = match mode {
            XdpMode::Native => &[(AyaMode::Driver, NATIVE)],
            XdpMode::Generic => &[(AyaMode::Skb, GENERIC)],
            XdpMode::Auto => &[(AyaMode::Driver, NATIVE), (AyaMode::Skb, GENERIC)],
        };
        let mut reason = None;
        for (index, &(aya_mode, mode)) in modes.iter().enumerate() {
            match program.attach(interface, aya_mode) {
                Ok(id) => {
                    let refused = |error| LoadError::Program(Box::new(error));
                    let link = program.take_link(id).map_err(refused)?;
                    let link = FdLink::try_from(link).map_err(|error| LoadError::Link {
                        path: path.clone(),
                        source: Box::new(error),
                    })?;
                    link.pin(&path).map_err(|error| LoadError::Pin {
                        path: path.clone(),
                        source: Box::new(error),
                    })?;
                    return Ok(Attachment { mode, reason });
                }
                Err(aya::programs::ProgramError::UnknownInterface { name }) => {
                    return Err(LoadError::NoInterface(name));
                }
                Err(error) if index + 1 < modes.len() => {
                    reason = Some(format!("native mode refused: {}", error_chain(&error)));
                }
                Err(error) => {
                    let interface = interface.to_owned();
                    return Err(LoadError::Attach { interface, mode, source: Box::new(error) });
                }
            }
        }
        Err(LoadError::NoProgram)
    }

    /// Detaches it, and says whether it was there.
    ///
    /// # Errors
    ///
    /// [`LoadError::Path`].
    pub fn detach(&self, interface: &str) -> Result<bool, LoadError> {
        let path = self.link(interface);
        if !path.exists() {
            return Ok(false);
        }
        remove(&path)?;
        if self.interfaces()?.is_empty() {
            remove(&self.directory.join(COUNTERS))?;
        }
        Ok(true)
    }

    /// What became of frames; `None`: nothing is attached.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`].
    pub fn counters(&self) -> Result<Option<Decapsulated>, LoadError> {
        let path = self.directory.join(COUNTERS);
        if !path.exists() {
            return Ok(None);
        }
        let refused = |error| LoadError::Map { name: COUNTERS, source: Box::new(error) };
        let map = MapData::from_pin(path).and_then(Map::from_map_data).map_err(refused)?;
        let counters = PerCpuArray::<_, Counter>::try_from(map).map_err(refused)?;
        let sum = |kind| -> Result<Counter, LoadError> {
            let per_cpu = counters.get(&kind, 0).map_err(refused)?;
            Ok(per_cpu.iter().fold(Counter::default(), |sum, cpu| Counter {
                packets: sum.packets + cpu.packets,
                bytes: sum.bytes + cpu.bytes,
            }))
        };
        Ok(Some(Decapsulated {
            passed: sum(DECAP_PASSED)?,
            opened: sum(DECAP_OPENED)?,
            dropped: sum(DECAP_DROPPED)?,
        }))
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, LoadError> {
    ebpf.program_mut(PROGRAM)
        .ok_or(LoadError::NoProgram)?
        .try_into()
        .map_err(|error| LoadError::Program(Box::new(error)))
}
