//! How often other hosts have claimed VIPs.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Claims by VIP, since the agent started. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ClaimCounts(Arc<Mutex<BTreeMap<IpAddr, u64>>>);

impl ClaimCounts {
    /// One more.
    pub fn add(&self, vip: IpAddr) {
        *self.lock().entry(vip).or_default() += 1;
    }

    /// Those that there were.
    #[must_use]
    pub fn all(&self) -> BTreeMap<IpAddr, u64> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpAddr, u64>> {
        // Every change leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
