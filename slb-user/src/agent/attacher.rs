//! Keeps the program attached to the configured interfaces.

use tracing::info;

use super::watcher::NetworkSnapshot;
use crate::{
    config::{Config, Gateway},
    datapath::{Attachment, LoadError, Loaded},
    net::{GENERIC, Interface},
};

/// Knows where the program is attached.
#[derive(Default)]
pub(super) struct Attacher {
    attached: Vec<(Interface, Attachment)>,
}

impl Attacher {
    /// Where the program is attached, and how.
    pub(super) fn attached(&self) -> &[(Interface, Attachment)] {
        &self.attached
    }

    /// Whether XDP is in generic mode somewhere.
    pub(super) fn is_generic(&self) -> bool {
        self.attached.iter().any(|(_, attachment)| attachment.mode == GENERIC)
    }

    /// Whether every interface of a configuration that one before, in force, does not have is there, and free or ours.
    /// Changes nothing.
    pub(super) fn check(
        datapath: &Loaded,
        config: &Config,
        before: Option<&Config>,
        network: &NetworkSnapshot,
    ) -> Result<(), LoadError> {
        let is_new =
            |name: &&String| before.is_none_or(|before| !before.gateway.interfaces.contains(name));
        config.gateway.interfaces.iter().filter(is_new).try_for_each(|name| {
            let (interface, present) = network.interface(name)?;
            datapath.check(interface, *present)
        })
    }

    /// Attaches the program to each interface that does not have it: all of them at first, and later
    /// those that were deleted and made again, or from which it was taken.
    pub(super) fn attach(
        &mut self,
        datapath: &mut Loaded,
        config: &Config,
        network: &NetworkSnapshot,
    ) -> Result<(), LoadError> {
        let mut result = Ok(());
        for name in &config.gateway.interfaces {
            // One that fails is no reason to leave the others without.
            if let Err(error) = self.attach_to(datapath, &config.gateway, network, name) {
                result = Err(error);
            }
        }
        result
    }

    fn attach_to(
        &mut self,
        datapath: &mut Loaded,
        gateway: &Gateway,
        network: &NetworkSnapshot,
        name: &str,
    ) -> Result<(), LoadError> {
        self.attached.retain(|(known, _)| {
            known.name != name
                || network.interfaces.iter().any(|(found, _)| found.index == known.index)
        });
        let (interface, present) = network.interface(name)?.clone();
        let is_known = self.attached.iter().any(|(known, _)| known.name == name);
        if is_known && datapath.is_attached(&interface)? {
            return Ok(());
        }
        self.attached.retain(|(known, _)| known.name != name);
        let attachment = datapath.attach(&interface, gateway.xdp_mode, present)?;
        let Attachment { mode, reason } = &attachment;
        info!(interface = name, mode, reason, "XDP attached");
        self.attached.push((interface, attachment));
        Ok(())
    }

    /// Forgets all attachments, so that they are made anew.
    pub(super) fn forget(&mut self) {
        self.attached.clear();
    }

    /// Forgets the attachments to interfaces that a configuration does not have.
    pub(super) fn keep(&mut self, config: &Config) {
        self.attached.retain(|(known, _)| config.gateway.interfaces.contains(&known.name));
    }
}
