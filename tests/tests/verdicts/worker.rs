//! A datapath that is loaded once and used by one test after another.
//!
//! To load its programs takes the kernel a second, to reset their maps some milliseconds. A worker is a
//! folder with the pins of a datapath; who holds the lock in it uses it. So it does not matter whether
//! tests are threads or processes.

use std::{
    borrow::Cow,
    fs::{self, File, TryLockError},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::PathBuf,
};

use aya::{maps::MapType, programs::Xdp};
use aya_obj::programs::XdpAttachType;
use slb_common::abi::{ABI_VERSION, Seed, Settings};
use slb_lab::workers;
use slb_user::datapath::{Capacities, Loaded, OBJECT, Pins};

use crate::fixture::TABLE_SEED;
use raw::Raw;

#[path = "worker/raw.rs"]
mod raw;

/// The only map that is not empty in a datapath that was just loaded.
const SETTINGS: &str = "SLB_SETTINGS";

/// Names the file of another build of the datapath, which is tested in place of this build's.
const OTHER_OBJECT: &str = "SLB_OBJECT";

fn object() -> Cow<'static, [u8]> {
    match std::env::var_os(OTHER_OBJECT) {
        Some(path) => fs::read(path).expect("an object").into(),
        None => OBJECT.into(),
    }
}

/// A loaded datapath, whose maps are as they were when it was loaded.
pub(crate) struct Worker {
    folder: PathBuf,
    /// Released when it is closed.
    _lock: File,
}

impl Worker {
    /// Takes a worker that is not in use, or makes one.
    pub(crate) fn take(capacities: Capacities) -> Self {
        let Capacities { flows, chunks } = capacities;
        let mut hash = DefaultHasher::new();
        object().hash(&mut hash);
        let folder = workers::folder()
            .expect("root")
            .join(format!("{:016x}-{flows}-{chunks}", hash.finish()));
        for number in 0_u32.. {
            let folder = folder.join(number.to_string());
            fs::create_dir_all(&folder).expect("root");
            let lock = File::create(folder.join("lock")).expect("a lock");
            match lock.try_lock() {
                Ok(()) => {
                    let worker = Self { folder, _lock: lock };
                    worker.prepare(capacities);
                    return worker;
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => panic!("{}: {error}", folder.display()),
            }
        }
        unreachable!("more workers than numbers");
    }

    /// Where everything is pinned.
    pub(crate) fn pins(&self) -> PathBuf {
        self.folder.join(workers::PINS)
    }

    /// The program in use.
    pub(crate) fn program(&self) -> Xdp {
        Xdp::from_pin(self.program_pin(), XdpAttachType::Interface).expect("the program")
    }

    /// Loads another program onto the maps, as an agent that is started again.
    pub(crate) fn load(&self, capacities: Capacities) {
        let mut loaded = Loaded::open_object(&object(), Pins::new(&self.pins()), capacities)
            .expect("the datapath");
        // Tests say where flows go.
        let known = |settings: &mut Settings| {
            (settings.seed, settings.table_seed) = (Seed::PUBLIC, TABLE_SEED);
        };
        loaded.maps.set(known).expect("settings");
        let pin = self.program_pin();
        if pin.exists() {
            fs::remove_file(&pin).expect("an old pin");
        }
        loaded.program().expect("the program").pin(pin).expect("a pin");
    }

    fn program_pin(&self) -> PathBuf {
        self.pins().join("program")
    }

    fn prepare(&self, capacities: Capacities) {
        // Written when all else is there.
        let settings = self.folder.join("settings");
        if settings.exists() {
            self.reset(&fs::read(settings).expect("the settings"));
            return;
        }
        fs::create_dir_all(self.pins()).expect("a folder");
        self.load(capacities);
        let part = self.folder.join("part");
        let fresh = self.maps().into_iter().find(|map| map.name == SETTINGS).expect("a map");
        fs::write(&part, fresh.lookup(&0_u32.to_ne_bytes()).expect("settings")).expect("a file");
        fs::rename(part, settings).expect("a file");
    }

    fn maps(&self) -> Vec<Raw> {
        let folder = self.pins().join(format!("v{ABI_VERSION}/maps"));
        let pins = fs::read_dir(folder).expect("the maps").flatten();
        pins.map(|pin| Raw::open(&pin.path())).collect()
    }

    fn reset(&self, settings: &[u8]) {
        for map in self.maps() {
            match map.kind {
                // The programs stay.
                MapType::ProgramArray => {}
                _ if map.name == SETTINGS => map.fill(settings),
                MapType::Array | MapType::PerCpuArray => map.fill(&vec![0; map.value]),
                _ => map.keys().for_each(|key| map.delete(&key)),
            }
        }
    }
}

#[test]
#[ignore = "needs root"]
fn given_garbage_in_every_map_when_the_worker_is_taken_again_then_all_are_as_after_loading() {
    // No other test takes these, so the first to take it is the one to load it.
    let capacities = Capacities { flows: 778, chunks: 7 };
    let dump = |worker: &Worker| -> Vec<_> {
        worker.maps().iter().map(|map| (map.name.clone(), map.contents())).collect()
    };
    let worker = Worker::take(capacities);
    let folder = worker.folder.clone();
    let fresh = dump(&worker);
    for map in worker.maps() {
        map.litter();
    }
    let littered = dump(&worker);
    drop(worker);
    let worker = Worker::take(capacities);

    assert_eq!(worker.folder, folder);
    for ((name, fresh), (_, littered)) in fresh.iter().zip(&littered) {
        assert_eq!(fresh == littered, name == "SLB_PROGRAMS", "{name} was to be changed");
    }
    for ((name, fresh), (_, reset)) in fresh.iter().zip(dump(&worker)) {
        assert!(*fresh == reset, "{name} differs");
    }
}
