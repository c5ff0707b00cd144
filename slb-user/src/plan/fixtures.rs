//! The maps, as far as a plan is concerned.

use super::Step;
use crate::state::State;

/// Carries out one step, as the adapter on the maps does.
pub fn apply(state: &mut State, step: Step) {
    match step {
        Step::PutInterface(index, interface) => drop(state.interfaces.insert(index, interface)),
        Step::PutSource(index, addr) => drop(state.sources.insert(index, addr)),
        Step::PutBackend(id, backend) => drop(state.backends.insert(id, backend)),
        Step::PutListener(endpoint, service) => drop(state.listeners.insert(endpoint, service)),
        Step::RemoveListener(endpoint) => drop(state.listeners.remove(&endpoint)),
        Step::PutEndpoint(endpoint, value) => drop(state.endpoints.insert(endpoint, value)),
        Step::RemoveEndpoint(endpoint) => drop(state.endpoints.remove(&endpoint)),
        Step::PutAddress(addr, roles) => drop(state.addresses.insert(addr, roles)),
        Step::RemoveAddress(addr) => drop(state.addresses.remove(&addr)),
        Step::RemoveInterface(index) => drop(state.interfaces.remove(&index)),
    }
}
