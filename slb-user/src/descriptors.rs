//! File descriptors: probes come first, HTTP connections share what is left.

use std::{
    fs, io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Kept for what comes and goes: files, sockets to the kernel, a connection that is about to be closed.
const SPARE: u64 = 16;
/// HTTP servers: of the API, of its socket for monitoring, of metrics.
const SERVERS: u64 = 3;
/// Connections that each of them may have in any case.
const FEWEST: u64 = 4;
/// More than that are of no use.
const MOST: u64 = 128;

/// A probe takes a socket, and there may be thousands at once.
///
/// # Errors
///
/// The system call failed.
pub fn raise_limit() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft == hard {
        // slb.service sets both, and does not allow the call.
        return Ok(());
    }
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

/// How many connections an HTTP server may have now.
#[derive(Clone, Debug)]
pub struct MostConnections(Arc<AtomicUsize>);

impl Default for MostConnections {
    fn default() -> Self {
        Self(Arc::new(AtomicUsize::new(MOST as usize)))
    }
}

impl MostConnections {
    /// So many.
    #[cfg(test)]
    pub(crate) fn of(count: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(count)))
    }

    /// The number.
    #[must_use]
    pub fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the agent's descriptors are for.
#[derive(Debug)]
pub(crate) struct Descriptors {
    limit: u64,
    /// Open all the time: maps, programs, sockets.
    own: u64,
    probes: u64,
    connections: MostConnections,
}

impl Descriptors {
    /// Nothing is open yet.
    pub(crate) fn new() -> io::Result<Self> {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        Ok(Self { limit, own: 0, probes: 0, connections: MostConnections::default() })
    }

    /// Counts the descriptors that are open now as open for ever.
    pub(crate) fn count_open(&mut self) -> io::Result<()> {
        // Reading the directory takes one itself.
        self.own = (fs::read_dir("/proc/self/fd")?.count() as u64).saturating_sub(1);
        Ok(())
    }

    pub(crate) const fn connections(&self) -> &MostConnections {
        &self.connections
    }

    /// So many probes may be under way at once.
    pub(crate) fn reserve(&mut self, probes: usize) {
        self.probes = probes as u64;
        let left = self.limit.saturating_sub(self.own + self.probes + SPARE);
        let each = (left / SERVERS).clamp(FEWEST, MOST);
        self.connections.0.store(each as usize, Ordering::Relaxed);
    }

    /// That there are too few, in words.
    pub(crate) fn problem(&self) -> Option<String> {
        let Self { limit, own, probes, .. } = self;
        let needed = own + probes + SPARE + SERVERS * FEWEST;
        (needed > *limit).then(|| {
            format!(
                "at most {limit} files can be open, but {needed} are needed if all {probes} health checks \
                 probe at once; raise LimitNOFILE= of the unit, or `ulimit -n`"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_that_are_open_are_counted_once_and_when_asked() {
        let mut descriptors = Descriptors::new().unwrap();
        assert_eq!(descriptors.own, 0);
        descriptors.count_open().unwrap();
        let before = descriptors.own;
        // Far more than other tests open or close meanwhile.
        let files: Vec<_> = (0..500).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        descriptors.count_open().unwrap();
        let opened = descriptors.own - before;
        assert!((400..=600).contains(&opened), "{opened} of {}", files.len());
    }

    #[test]
    fn connections_get_what_probes_leave() {
        let cases = [
            // limit, probes; connections of each server, and whether that is a problem
            (131_072, 5_000, 128, false),
            (300, 50, 51, false),
            (300, 192, 4, false),
            (300, 193, 4, true),
            (130, 50, 4, true),
        ];
        for (limit, probes, expected, is_short) in cases {
            let connections = MostConnections::default();
            let mut descriptors = Descriptors { limit, own: 80, probes: 0, connections };
            descriptors.reserve(probes);
            assert_eq!(descriptors.connections().get(), expected, "{limit}, {probes}");
            assert_eq!(descriptors.problem().is_some(), is_short, "{limit}, {probes}");
        }
    }
}
