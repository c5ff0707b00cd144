//! Attaching: one pinned link per interface, which outlives the agent.

use std::{fs, io, path::Path};

use aya::programs::{
    ProgramError, ProgramInfo, XdpMode as AyaMode,
    links::{FdLink, PinnedLink},
    xdp::XdpLink,
};

use super::{LoadError, Loaded, pins::remove};
use crate::{
    causes::causes,
    config::XdpMode,
    net::{AttachedXdp, GENERIC, Interface, NATIVE},
};

/// How XDP is attached to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// [`NATIVE`] or [`GENERIC`].
    pub mode: &'static str,
    /// Why, if the mode was not the first choice.
    pub reason: Option<String>,
}

impl Loaded {
    /// Whether the program could be attached to an interface: it is there already, or nothing is.
    ///
    /// `present` is the XDP program that the interface has now, whoever put it there.
    ///
    /// # Errors
    ///
    /// [`LoadError::Occupied`], or a pinned link cannot be looked at.
    pub fn check(
        &self,
        interface: &Interface,
        present: Option<AttachedXdp>,
    ) -> Result<(), LoadError> {
        if self.is_attached(interface)? {
            return Ok(());
        }
        match present {
            Some(AttachedXdp { program: id, .. }) => Err(LoadError::Occupied {
                interface: interface.name.clone(),
                name: program_name(id),
                id,
            }),
            None => Ok(()),
        }
    }

    /// Whether an agent has attached the program to this interface, and it still is.
    ///
    /// # Errors
    ///
    /// A pinned link cannot be looked at.
    pub fn is_attached(&self, interface: &Interface) -> Result<bool, LoadError> {
        let link = self.link(&interface.name)?;
        Ok(link.is_some_and(|link| link.ifindex == interface.index))
    }

    /// Attaches the program to `interface`, or puts it into the link that is pinned for it.
    ///
    /// `present` is the XDP program that the interface has now, whoever put it there.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; a program of somebody else is left alone.
    pub fn attach(
        &mut self,
        interface: &Interface,
        mode: XdpMode,
        present: Option<AttachedXdp>,
    ) -> Result<Attachment, LoadError> {
        self.check(interface, present)?;
        let path = self.pins.link(&interface.name);
        if let Some(link) = self.link(&interface.name)? {
            // A link that works is not given up because the kernel did not say in which mode.
            let found = present.map(|xdp| xdp.mode);
            let is_as_wanted = match mode {
                XdpMode::Native => found != Some(GENERIC),
                XdpMode::Generic => found != Some(NATIVE),
                XdpMode::Auto => true,
            };
            if link.ifindex == interface.index && is_as_wanted {
                self.replace(&path, link)?;
                let mode = found.unwrap_or(if mode == XdpMode::Generic { GENERIC } else { NATIVE });
                let reason = Some("attached by an earlier agent".to_owned());
                return Ok(Attachment { mode, reason });
            }
            // In another mode, or on an interface that was deleted and made again. Closed last: what
            // a closed descriptor holds the kernel lets go of at once, what a pin holds later.
            remove(&path)?;
            drop(link);
        }
        let (link, attachment) = self.attach_first(&interface.name, mode)?;
        link.pin(&path)
            .map_err(|error| LoadError::Pin { path: path.clone(), source: Box::new(error) })?;
        self.pin_program()?;
        Ok(attachment)
    }

    /// The link that is pinned for an interface.
    fn link(&self, interface: &str) -> Result<Option<OpenLink>, LoadError> {
        let path = self.pins.link(interface);
        if path.exists() { OpenLink::open(&path).map(Some) } else { Ok(None) }
    }

    /// Swaps this program into a pinned link, unless the very same is there.
    fn replace(&mut self, path: &Path, pinned: OpenLink) -> Result<(), LoadError> {
        let refused = |error| LoadError::Program(Box::new(error));
        let pin = self.pins.program();
        let program = self.program()?;
        let info = program.info().map_err(refused)?;
        if is_same_program(&info, &pin, pinned.program).map_err(refused)? {
            return Ok(());
        }
        let was = pinned.program;
        let link: XdpLink = pinned
            .link
            .try_into()
            .map_err(|error| LoadError::Link { path: path.to_owned(), source: Box::new(error) })?;
        let id = program.attach_to_link(link).map_err(refused)?;
        // Owned by its pin, not by this process.
        drop(program.take_link(id).map_err(refused)?);
        let (link, program) = (path.display(), info.id());
        tracing::info!(%link, program, was, "replaced the XDP program");
        self.pin_program()
    }

    fn attach_first(
        &mut self,
        interface: &str,
        mode: XdpMode,
    ) -> Result<(FdLink, Attachment), LoadError> {
        match mode {
            XdpMode::Native => self.attach_as(interface, AyaMode::Driver, NATIVE, None),
            XdpMode::Generic => self.attach_as(interface, AyaMode::Skb, GENERIC, None),
            XdpMode::Auto => match self.attach_as(interface, AyaMode::Driver, NATIVE, None) {
                Err(LoadError::Attach { source, .. }) => {
                    let reason = format!("native mode refused: {}", causes(&*source));
                    self.attach_as(interface, AyaMode::Skb, GENERIC, Some(reason))
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
        let program = self.program()?;
        let id = program.attach(interface, mode).map_err(refused)?;
        let link = program.take_link(id).map_err(refused)?;
        // A netlink attachment, aya's fall-back, would end with this process; kernels that this
        // program loads on have links.
        let path = self.pins.link(interface);
        let link = FdLink::try_from(link)
            .map_err(|error| LoadError::Link { path, source: Box::new(error) })?;
        Ok((link, Attachment { mode: name, reason }))
    }

    fn pin_program(&mut self) -> Result<(), LoadError> {
        let path = self.pins.program();
        if path.exists() {
            remove(&path)?;
        }
        let program = self.program()?;
        program.pin(&path).map_err(|error| LoadError::Pin { path, source: Box::new(error) })
    }

    /// Detaches from the interfaces that are not in `wanted`.
    ///
    /// # Errors
    ///
    /// [`LoadError`].
    pub fn detach_others(&self, wanted: &[String]) -> Result<(), LoadError> {
        for (name, path) in self.pins.links()? {
            if !wanted.contains(&name) {
                remove(&path)?;
                tracing::info!(interface = name, "detached XDP");
            }
        }
        Ok(())
    }
}

/// A pinned link.
struct OpenLink {
    link: FdLink,
    /// Of the program in it.
    program: u32,
    /// Where it is attached; 0: that interface is gone, or somebody has detached it.
    ifindex: u32,
}

impl OpenLink {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let broken = |error| LoadError::Link { path: path.to_owned(), source: Box::new(error) };
        let link = FdLink::from(PinnedLink::from_pin(path).map_err(broken)?);
        let info = link.info().map_err(broken)?;
        let ifindex = ifindex(info.id())
            .map_err(|source| LoadError::Path { path: path.to_owned(), source })?;
        Ok(Self { program: info.program_id(), ifindex, link })
    }
}

/// Where an XDP link that this process holds open is attached.
///
/// aya does not show this part of the link's information, the kernel's text about the descriptor
/// does.
fn ifindex(link: u32) -> io::Result<u32> {
    for entry in fs::read_dir("/proc/self/fdinfo")? {
        let text = match fs::read_to_string(entry?.path()) {
            Ok(text) => text,
            // Descriptors of other threads come and go.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let field =
            |name| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        if field("link_id:") == Some(link) {
            return Ok(field("ifindex:").unwrap_or_default());
        }
    }
    Ok(0)
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

fn program_name(id: u32) -> String {
    aya::programs::loaded_programs()
        .filter_map(Result::ok)
        .find(|info| info.id() == id)
        .and_then(|info| info.name_as_str().map(str::to_owned))
        .unwrap_or_default()
}
