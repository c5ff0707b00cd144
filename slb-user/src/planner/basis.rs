//! What a plan is made from, so that the next one is made for those listeners only that it may be another for.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use slb_common::abi::{Interface, Seed};

use super::{BackendRoute, Inputs};
use crate::{
    health::Health,
    ids::{Ids, IndexedBackend},
    net::Ingress,
};

/// All that a plan depends on but time, what is installed, and how far schedules have come.
#[derive(Debug)]
pub(super) struct Basis {
    pub ids: Arc<Ids>,
    /// One per element of [`Ids::backends`].
    backends: Vec<BackendInputs>,
    generic: bool,
    interfaces: BTreeMap<u32, Interface>,
    locals: Vec<IpAddr>,
    ingress: Arc<Ingress>,
    seed: Seed,
}

/// What concerns one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BackendInputs {
    health: Health,
    is_trusted: bool,
    is_closing: bool,
    route: Option<BackendRoute>,
}

impl Basis {
    pub(super) fn new(ids: &Arc<Ids>, inputs: &Inputs<'_>) -> Self {
        let backends = ids.backends.iter().zip(inputs.health);
        let backends = backends.map(|(backend, &health)| BackendInputs {
            health,
            is_trusted: inputs.trusted.contains(&backend.id),
            is_closing: inputs.closing.contains(&backend.id),
            route: inputs.routes.get(&backend.addr.ip()).copied(),
        });
        Self {
            backends: backends.collect(),
            ids: Arc::clone(ids),
            generic: inputs.generic,
            interfaces: inputs.interfaces.clone(),
            locals: inputs.locals.to_vec(),
            ingress: Arc::clone(inputs.ingress),
            seed: inputs.seed,
        }
    }

    /// Whether something that concerns a listener differs, one element per listener. `None`: something differs that may
    /// concern several, or what the keys of the maps are made of.
    pub(super) fn changed_since(&self, before: &Self) -> Option<Vec<bool>> {
        let is_alike = self.generic == before.generic
            && self.interfaces == before.interfaces
            && self.locals == before.locals
            && self.ingress == before.ingress
            && self.seed == before.seed
            && self.ids.listeners == before.ids.listeners
            && self.ids.backends.len() == before.ids.backends.len();
        if !is_alike {
            return None;
        }
        let same_ids = Arc::ptr_eq(&self.ids, &before.ids);
        let changed = self.ids.listeners.iter().map(|listener| {
            let range = || listener.backends.clone();
            let (is, was) = (&self.ids.backends[range()], &before.ids.backends[range()]);
            if same_ids || is == was {
                return Some(self.backends[range()] != before.backends[range()]);
            }
            is.iter().zip(was).all(|(is, was)| is_same_server(is, was)).then_some(true)
        });
        changed.collect()
    }
}

/// Whether two differ by what concerns their listener alone: nothing of it is part of a key in the maps, or tells for
/// whom an address answers.
fn is_same_server(is: &IndexedBackend, was: &IndexedBackend) -> bool {
    let IndexedBackend { weight, drains, check, .. } = is.clone();
    IndexedBackend { weight, drains, check, ..was.clone() } == *is
}
