//! Attaching: one pinned link per interface, which outlives the agent.

use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::{
    programs::{
        ProgramError, Xdp, XdpMode as AyaMode,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
    sys::SyscallError,
};
use aya_obj::programs::XdpAttachType;
use nix::net::if_::if_nametoindex;

use super::{
    LoadError, Loaded,
    pins::{link as link_name, remove},
    syscall,
};
use crate::{
    config::XdpMode,
    error_chain::error_chain,
    net::{AttachedXdp, GENERIC, Interface, NATIVE},
    rights::{ATTACH, FILES},
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
    /// `present` is the XDP program that the interface has now, ours or another.
    ///
    /// # Errors
    ///
    /// [`LoadError::Occupied`], [`LoadError::OtherLayout`], or a pinned link cannot be looked at.
    pub fn check(
        &self,
        interface: &Interface,
        present: Option<AttachedXdp>,
    ) -> Result<(), LoadError> {
        let _raised = FILES.raise();
        if self.is_attached(interface)? {
            return Ok(());
        }
        let Some(AttachedXdp { program, .. }) = present else { return Ok(()) };
        let interface = interface.name.clone();
        for pins in self.pins.other_versions()? {
            let link = pins.join("links").join(link_name(&interface));
            if link.exists() && OpenLink::open(&link)?.program == program {
                return Err(LoadError::OtherLayout { interface, pins });
            }
        }
        Err(LoadError::Occupied { interface, program })
    }

    /// Whether an agent has attached the program to this interface, and it still is.
    ///
    /// # Errors
    ///
    /// A pinned link cannot be looked at.
    pub fn is_attached(&self, interface: &Interface) -> Result<bool, LoadError> {
        if let Some(held) = self.links.get(&interface.name) {
            let path = self.pins.link(&interface.name);
            let found = syscall::ifindex(held.link.as_fd());
            let found = found.map_err(|source| LoadError::Path { path, source })?;
            return Ok(found == interface.index);
        }
        let _raised = FILES.raise();
        let link = self.link(&interface.name)?;
        Ok(link.is_some_and(|link| link.ifindex == interface.index))
    }

    /// Attaches the program to `interface`, or puts it into the link that is pinned for it.
    ///
    /// `present` is the XDP program that the interface has now, ours or another.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; a program that is not ours is left alone.
    pub fn attach(
        &mut self,
        interface: &Interface,
        mode: XdpMode,
        present: Option<AttachedXdp>,
    ) -> Result<Attachment, LoadError> {
        let _raised = FILES.raise();
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
                self.hold(interface)?;
                let mode = found.unwrap_or(if mode == XdpMode::Generic { GENERIC } else { NATIVE });
                let reason = Some("attached by an earlier agent".to_owned());
                return Ok(Attachment { mode, reason });
            }
            // In another mode, or on an interface that was deleted and made again. Closed last: what
            // a closed descriptor holds the kernel lets go of at once, what a pin holds later.
            remove(&path)?;
            drop(link);
        }
        self.links.remove(&interface.name);
        let (link, attachment) = self.attach_first(&interface.name, mode)?;
        link.pin(&path)
            .map_err(|error| LoadError::Pin { path: path.clone(), source: Box::new(error) })?;
        self.pin_program()?;
        self.hold(interface)?;
        Ok(attachment)
    }

    /// Keeps the link of an interface open, so that XDP stays if its pin is removed.
    fn hold(&mut self, interface: &Interface) -> Result<(), LoadError> {
        let path = self.pins.link(&interface.name);
        let link = syscall::open(&path).map_err(|source| LoadError::Path { path, source })?;
        self.links.insert(interface.name.clone(), HeldLink { link, ifindex: interface.index });
        Ok(())
    }

    /// The interfaces from which another program has detached XDP. They are named once.
    pub fn take_detached(&mut self) -> Vec<String> {
        let detached = self.links.iter().filter(|(name, HeldLink { link, ifindex })| {
            // A link to an interface that was deleted is detached as well.
            let is_there = if_nametoindex(name.as_str()).is_ok_and(|index| index == *ifindex);
            is_there && syscall::ifindex(link.as_fd()).is_ok_and(|index| index == 0)
        });
        let detached: Vec<String> = detached.map(|(name, _)| name.clone()).collect();
        detached.iter().for_each(|name| drop(self.links.remove(name)));
        detached
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
        if is_same_program(program, &pin, pinned.program).map_err(refused)? {
            return Ok(());
        }
        let new = program.info().map_err(refused)?.id();
        let was = pinned.program;
        let link: XdpLink = pinned
            .link
            .try_into()
            .map_err(|error| LoadError::Link { path: path.to_owned(), source: Box::new(error) })?;
        let id = program.attach_to_link(link).map_err(refused)?;
        // Owned by its pin, not by this process.
        drop(program.take_link(id).map_err(refused)?);
        tracing::info!(link = %path.display(), program = new, was, "replaced the XDP program");
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
                    let reason = format!("native mode refused: {}", error_chain(&*source));
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
        let raised = ATTACH.raise();
        let id = program.attach(interface, mode).map_err(refused)?;
        drop(raised);
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
    pub fn detach_others(&mut self, wanted: &[String]) -> Result<(), LoadError> {
        let _raised = FILES.raise();
        for (name, path) in self.pins.links()? {
            if !wanted.contains(&name) {
                remove(&path)?;
                self.links.remove(&name);
                tracing::info!(interface = name, "detached XDP");
            }
        }
        Ok(())
    }
}

/// A link that the agent keeps open.
pub(super) struct HeldLink {
    pub link: OwnedFd,
    /// Of the interface that it was made for.
    ifindex: u32,
}

/// A pinned link.
struct OpenLink {
    link: FdLink,
    /// Of the program in it.
    program: u32,
    /// Where it is attached; 0: that interface is gone, or it was detached.
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

/// Whether the pinned program is the one with this id, and does the same as `new`: the same instructions on the same
/// maps.
///
/// Through the pin, because looking up a program by its id takes `CAP_SYS_ADMIN`.
fn is_same_program(new: &Xdp, pin: &Path, id: u32) -> Result<bool, ProgramError> {
    let Ok(old) = Xdp::from_pin(pin, XdpAttachType::Interface) else { return Ok(false) };
    let (old_info, new_info) = (old.info()?, new.info()?);
    Ok(old_info.id() == id && old_info.tag() == new_info.tag() && map_ids(&old)? == map_ids(new)?)
}

/// The maps that a program uses.
///
/// [`aya::programs::ProgramInfo::map_ids`] opens the program by its id, which takes `CAP_SYS_ADMIN`.
fn map_ids(program: &Xdp) -> Result<BTreeSet<u32>, ProgramError> {
    let fd = program.fd()?.as_fd();
    let failed = |io_error| SyscallError { call: "bpf_obj_get_info_by_fd", io_error };
    let count = syscall::program_info(fd, &mut []).map_err(failed)?.nr_map_ids;
    let mut ids = vec![0; count as usize];
    syscall::program_info(fd, &mut ids).map_err(failed)?;
    Ok(ids.into_iter().collect())
}
