//! Names of what the lab creates outside its own process.
//!
//! They carry the process id, so that what a killed lab left can be told from one that is running.

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

const PREFIX: &str = "slb-lab";

/// A name that no other lab has: `slb-lab-<pid>-<count>`.
pub(crate) fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Whether `name` was made by [`unique`], perhaps with an ending, in a process that is gone.
pub(crate) fn is_stale(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|rest| rest.split('-').next())
        .and_then(|pid| pid.parse::<u32>().ok())
        .is_some_and(is_gone)
}

/// Whether there is no process of this number.
pub(crate) fn is_gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_names_of_a_dead_a_living_and_no_lab_when_asked_then_only_the_dead_one_is_stale() {
        let living = format!("{}-gw", unique());
        // Above the largest process id that Linux gives out.
        let cases = [("slb-lab-4194305-0-gw", true), (living.as_str(), false), ("blue", false)];
        for (name, stale) in cases {
            assert_eq!(is_stale(name), stale, "{name}");
        }
    }
}
