//! An edit of the configuration in memory, which spares reading the edited file once more.

use std::{collections::HashMap, sync::Arc};

use super::{Edit, Place};
use crate::config::{Backend, Config, Group, GroupKind, Instance, Listener, MAX_WEIGHT};

impl Config {
    /// What the configuration is after an edit that needs no look at the rest of the file. `None`: one that does,
    /// or that is wrong.
    #[must_use]
    pub fn edited(&self, edit: &Edit) -> Option<Self> {
        let mut config = self.clone();
        match edit {
            Edit::SetWeight { place, weight } => {
                let weight = u8::try_from(*weight).ok().filter(|weight| *weight <= MAX_WEIGHT)?;
                let group = config.group_mut(place)?;
                change(group, place, |backend| backend.weight = weight)
                    .filter(|()| group.kind != GroupKind::PrimarySecondary)?;
            }
            Edit::DrainBackend { place, drain } => {
                let group = config.group_mut(place)?;
                change(group, place, |backend| backend.drain = *drain)?;
            }
            Edit::EnableListener { instance, protocol, port, enabled } => {
                let mut listeners = config.instance_mut(instance)?.listeners.iter_mut();
                let is_it = |it: &&mut Listener| it.protocol == *protocol && it.port == *port;
                listeners.find(is_it)?.enabled = *enabled;
            }
            Edit::AddBackend { .. } | Edit::RemoveBackend { .. } => return None,
        }
        Some(config)
    }

    /// Takes over from another configuration the instances that are the same there, so that both share them.
    pub fn share(&mut self, other: &Self) {
        let known: HashMap<&str, &Arc<Instance>> =
            other.instances.iter().map(|instance| (instance.name.as_str(), instance)).collect();
        for instance in &mut self.instances {
            if let Some(&known) = known.get(instance.name.as_str())
                && known == instance
            {
                *instance = Arc::clone(known);
            }
        }
    }

    /// An instance, no longer shared with other configurations.
    fn instance_mut(&mut self, name: &str) -> Option<&mut Instance> {
        let mut instances = self.instances.iter_mut();
        instances.find(|instance| instance.name == name).map(Arc::make_mut)
    }

    /// The group of a place's backend: the one that the place names, or else the default group, or else the only one
    /// with a backend of that name.
    fn group_mut(&mut self, place: &Place) -> Option<&mut Group> {
        let groups = &mut self.instance_mut(&place.instance)?.groups;
        let has = |group: &Group| group.backends.iter().any(|it| it.name == place.backend);
        let at = groups.iter().position(|it| it.name == place.group && has(it)).or_else(|| {
            let mut others =
                (0..groups.len()).filter(|at| place.group.is_none() && has(&groups[*at]));
            others.next().filter(|_| others.next().is_none())
        });
        groups.get_mut(at?)
    }
}

/// Changes a backend, unless no backend of its group gets new flows after that, or none did before: the warnings are
/// others then.
fn change(group: &mut Group, place: &Place, change: impl FnOnce(&mut Backend)) -> Option<()> {
    let serves = |group: &Group| group.backends.iter().any(|it| it.weight > 0 && !it.drain);
    let served = serves(group);
    change(group.backends.iter_mut().find(|backend| backend.name == place.backend)?);
    (served && serves(group)).then_some(())
}
