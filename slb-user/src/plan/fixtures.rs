//! The maps, as far as a plan is concerned.

use slb_common::abi::Limits;

use super::Step;
use crate::state::State;

/// Carries out one step, as the adapter on the maps does.
pub(crate) fn apply(state: &mut State, step: Step) {
    match step {
        Step::PutInterface(index, interface) => drop(state.interfaces.insert(index, interface)),
        Step::PutMac(mac) => drop(state.macs.insert(mac, 1)),
        Step::RemoveMac(mac) => drop(state.macs.remove(&mac)),
        Step::PutSubnet(subnet, interfaces) => drop(state.subnets.insert(subnet, interfaces)),
        Step::RemoveSubnet(subnet) => drop(state.subnets.remove(&subnet)),
        Step::PutSource(index, addr) => drop(state.sources.insert(index, addr)),
        Step::PutBackend(id, backend) => drop(state.backends.insert(id, backend)),
        Step::PutAcl(acl, list) => drop(state.acls.insert(acl, list)),
        Step::RemoveAcl(acl, _) => drop(state.acls.remove(&acl)),
        Step::PutLimits(id, limits) if limits == Limits::default() => {
            state.limits.remove(&id);
        }
        Step::PutLimits(id, limits) => {
            state.limits.insert(id, limits);
        }
        Step::PutQuic(server, backend) => drop(state.quic.insert(server, backend)),
        Step::RemoveQuic(server) => drop(state.quic.remove(&server)),
        Step::PutListener(endpoint, service) => drop(state.listeners.insert(endpoint, service)),
        Step::RemoveListener(endpoint) => drop(state.listeners.remove(&endpoint)),
        Step::PutEndpoint(endpoint, value) => drop(state.endpoints.insert(endpoint, value)),
        Step::RemoveEndpoint(endpoint) => drop(state.endpoints.remove(&endpoint)),
        Step::PutAddress(addr, roles) => drop(state.addresses.insert(addr, roles)),
        Step::RemoveAddress(addr) => drop(state.addresses.remove(&addr)),
        Step::RemoveInterface(index) => drop(state.interfaces.remove(&index)),
    }
}
