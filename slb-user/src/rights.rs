//! Capabilities: the agent gives up those that it never needs, and has the others in effect only during the calls that
//! need them.
//!
//! The kernel keeps capabilities per thread, and a new thread gets those of the thread that makes it. So
//! [`confine`] runs while the process has one thread, and [`Need::raise`] concerns the calling thread only.
//!
//! ```text
//! slb run ─► read the file, mount bpffs ─► confine ─► threads, runtime ─► agent
//!                                                         raise ─► bpf(), netlink, socket ─► drop
//! ```
//!
//! Commands other than `slb run` are not confined: there [`Need::raise`] finds its capabilities in effect and changes
//! nothing.

use std::{io, marker::PhantomData};

use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs,
};

/// A call to the kernel, and the capabilities that it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// What is done, as a part of an error.
    call: &'static str,
    capabilities: CapabilitySet,
}

/// Creating maps, loading BTF and XDP programs. `CAP_PERFMON`, because the verifier refuses the programs without it.
///
/// Nothing else that `bpf()` is used for here takes a capability since Linux 5.19: pins are opened by the permissions of
/// their files, and elements are read and written through the descriptors of maps.
pub(crate) const LOAD: Need = Need {
    call: "create maps and load programs",
    capabilities: CapabilitySet::BPF.union(CapabilitySet::PERFMON).union(CapabilitySet::NET_ADMIN),
};

/// Attaching XDP: a BPF link takes nothing, but aya tries netlink if the driver refuses the link, and then the kernel
/// says why.
pub(crate) const ATTACH: Need = Need { call: "attach XDP", capabilities: CapabilitySet::NET_ADMIN };

/// Orders by netlink: addresses and neighbours. The kernel asks for the capability when the socket is opened, and when
/// the order is sent (`netlink_net_capable`).
pub(crate) const ORDER: Need =
    Need { call: "change addresses and neighbours", capabilities: CapabilitySet::NET_ADMIN };

/// A receive buffer above `net.core.rmem_max` (`SO_RCVBUFFORCE`, socket(7)).
pub(crate) const RECEIVE_BUFFER: Need =
    Need { call: "enlarge a receive buffer", capabilities: CapabilitySet::NET_ADMIN };

/// Opening a packet socket or a raw socket (packet(7), raw(7)); sending takes nothing.
pub(crate) const RAW_SOCKET: Need =
    Need { call: "open a raw socket", capabilities: CapabilitySet::NET_RAW };

/// Listening on a port below `net.ipv4.ip_unprivileged_port_start` (ip(7)).
pub(crate) const LOW_PORT: Need =
    Need { call: "listen on a port below 1024", capabilities: CapabilitySet::NET_BIND_SERVICE };

/// Files of another user, for an agent of root's: a configuration in a home directory, or files and pins of an agent that
/// ran as `slb`. `CAP_CHOWN` and `CAP_FOWNER` keep owner and mode of a configuration that is replaced.
pub(crate) const FILES: Need = Need {
    call: "use files of another user",
    capabilities: CapabilitySet::DAC_OVERRIDE
        .union(CapabilitySet::CHOWN)
        .union(CapabilitySet::FOWNER),
};

/// All that the agent may ever have in effect.
const ALL: [Need; 7] = [LOAD, ATTACH, ORDER, RECEIVE_BUFFER, RAW_SOCKET, LOW_PORT, FILES];

/// Capabilities that are in effect in this thread until this is dropped.
///
/// It belongs to its thread, so it is not `Send`: a task cannot hold it while it waits and wake up in another thread.
#[derive(Debug)]
#[must_use = "the capabilities are in effect until this is dropped"]
pub(crate) struct Raised {
    /// To go back to; `None`: nothing was changed.
    before: Option<CapabilitySets>,
    thread: PhantomData<*const ()>,
}

impl Need {
    /// Puts the capabilities into effect in this thread, as far as it has them.
    ///
    /// A capability that is missing is no error here: the call itself fails, and [`explain`](Self::explain) says why.
    pub(crate) fn raise(self) -> Raised {
        let before = put_into_effect(self.capabilities).unwrap_or_else(|error| {
            tracing::warn!(%error, call = self.call, "cannot put capabilities into effect");
            None
        });
        Raised { before, thread: PhantomData }
    }

    /// Makes the call with the capabilities in effect.
    ///
    /// # Errors
    ///
    /// Those of the call; a refusal names the call and its capabilities.
    pub(crate) fn during<T>(self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _raised = self.raise();
        call().map_err(|error| self.explain(error))
    }

    /// Adds to a refusal which call it was and which capabilities that takes.
    pub(crate) fn explain(self, error: io::Error) -> io::Error {
        if !matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) {
            return error;
        }
        let Self { call, .. } = self;
        let text = format!("{error}; to {call} takes {}", names(self.capabilities));
        io::Error::new(error.kind(), text)
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = set_capabilities(None, before)
        {
            tracing::error!(%error, "cannot take capabilities out of effect");
        }
    }
}

/// Returns the sets as they were, if that changes them.
fn put_into_effect(wanted: CapabilitySet) -> io::Result<Option<CapabilitySets>> {
    let before = capabilities(None)?;
    let effective = before.effective | wanted & before.permitted;
    if effective == before.effective {
        return Ok(None);
    }
    set_capabilities(None, CapabilitySets { effective, ..before })?;
    Ok(Some(before))
}

/// Gives up all capabilities but those that the agent needs, for good, and takes those out of effect. Programs that this
/// process executes get none.
///
/// For a process with one thread: others keep what they have.
///
/// # Errors
///
/// A system call is refused, as by a `SystemCallFilter=` without `capset`; what was done until then remains.
pub(crate) fn confine() -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let held = capabilities(None)?;
    // A process of root's has it; for another the service manager does this.
    if held.effective.contains(CapabilitySet::SETPCAP) {
        set_capabilities_secure_bits(
            CapabilitiesSecureBits::NO_ROOT
                | CapabilitiesSecureBits::NO_ROOT_LOCKED
                | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
                | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
        )?;
        empty_bounding_set()?;
    }
    let needed = ALL.into_iter().fold(CapabilitySet::empty(), |set, need| set | need.capabilities);
    let kept = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: held.permitted & needed,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, kept)?)
}

/// The set limits what programs get that are executed; it takes nothing from this process.
fn empty_bounding_set() -> io::Result<()> {
    for bit in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            // The kernel knows no capability of this number, nor of a higher one.
            Err(rustix::io::Errno::INVAL) => break,
            done => done?,
        }
    }
    Ok(())
}

/// As capabilities(7) writes them.
fn names(capabilities: CapabilitySet) -> String {
    let names: Vec<_> = capabilities.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command, thread};

    use super::*;

    fn effective() -> CapabilitySet {
        capabilities(None).unwrap().effective
    }

    /// Rights are a thread's: what this gives up, other tests keep.
    fn in_a_confined_thread(test: impl FnOnce() + Send) {
        thread::scope(|scope| {
            scope.spawn(|| {
                confine().unwrap();
                test();
            });
        });
    }

    #[test]
    fn confined_thread_has_nothing_in_effect_but_what_is_raised() {
        in_a_confined_thread(|| {
            let permitted = capabilities(None).unwrap().permitted;
            assert_eq!(effective(), CapabilitySet::empty());
            {
                let _outer = FILES.raise();
                assert_eq!(effective(), FILES.capabilities & permitted);
                {
                    let _inner = LOAD.raise();
                    let both = FILES.capabilities | LOAD.capabilities;
                    assert_eq!(effective(), both & permitted);
                    thread::scope(|scope| {
                        // Why nothing that starts threads may run with capabilities in effect.
                        scope.spawn(|| assert_eq!(effective(), both & permitted));
                    });
                }
                assert_eq!(effective(), FILES.capabilities & permitted);
            }
            assert_eq!(effective(), CapabilitySet::empty());
        });
    }

    #[test]
    fn programs_that_a_confined_thread_executes_have_no_capabilities() {
        in_a_confined_thread(|| {
            let _raised = LOAD.raise();
            let output = Command::new("cat").arg("/proc/self/status").output().unwrap();
            let status = String::from_utf8(output.stdout).unwrap();
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(field(set).trim(), "0000000000000000", "{set}");
            }
            assert_eq!(field("NoNewPrivs:").trim(), "1");
        });
    }

    #[test]
    fn thread_that_is_not_confined_keeps_what_it_has() {
        let before = fs::read_to_string("/proc/thread-self/status").unwrap();
        drop(RAW_SOCKET.raise());
        let after = fs::read_to_string("/proc/thread-self/status").unwrap();
        let sets = |status: &str| -> Vec<String> {
            status.lines().filter(|line| line.starts_with("Cap")).map(ToOwned::to_owned).collect()
        };
        assert_eq!(sets(&before), sets(&after));
    }

    #[test]
    fn refusal_names_the_call_and_its_capabilities() {
        let refused = || Err::<(), _>(io::Error::from_raw_os_error(libc::EPERM));
        let error = RAW_SOCKET.during(refused).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        let text = error.to_string();
        assert!(text.ends_with("; to open a raw socket takes CAP_NET_RAW"), "{text}");

        let other = ORDER.explain(io::Error::from_raw_os_error(libc::ENODEV));
        assert_eq!(other.raw_os_error(), Some(libc::ENODEV));
    }
}
