//! Where the seed of the hashes comes from: drawn for the installation, or made from a text that gateways share.

use std::{
    env, fmt, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha512};
use slb_common::abi::{SEED_WORDS, Seed};
use tracing::warn;

/// Name of the file in the state directory.
const FILE: &str = "seed";
/// Of a word in it.
const WORD_DIGITS: usize = 16;

/// A seed that gateways share because they name the same text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SharedSeed {
    seed: Seed,
    /// Tells two texts apart where they are shown, without giving either away.
    fingerprint: u32,
}

impl SharedSeed {
    /// The seed of a text: the first words of its SHA-512 (FIPS 180-4), in big-endian byte order.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let digest = Sha512::digest(text);
        let words: [u64; SEED_WORDS + 1] = std::array::from_fn(|word| {
            digest[8 * word..8 * (word + 1)]
                .iter()
                .fold(0, |word, byte| word << 8 | u64::from(*byte))
        });
        let [seed @ .., last] = words;
        Self { seed: Seed::new(seed), fingerprint: last as u32 }
    }

    /// What hashes are made with.
    #[must_use]
    pub const fn seed(&self) -> Seed {
        self.seed
    }
}

/// The fingerprint.
impl fmt::Display for SharedSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.fingerprint)
    }
}

impl fmt::Debug for SharedSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedSeed({self})")
    }
}

/// The seed of this installation, for schedules: the one in `directory`, which outlives the maps, or a random one, which is
/// written there. Established connections that have no entry find their backends again after a reboot only by the
/// same seed.
///
/// # Errors
///
/// The kernel gives no random numbers. A file that cannot be read or written is a warning.
pub fn of_installation(directory: Option<&Path>) -> io::Result<Seed> {
    let Some(path) = directory.map(|directory| directory.join(FILE)) else { return random() };
    match fs::read_to_string(&path) {
        Ok(text) => match parse(&text) {
            Some(seed) => return Ok(seed),
            None => warn!("{} holds no seed; drawing another one", path.display()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => warn!("cannot read {}: {error}; drawing another seed", path.display()),
    }
    let seed = random()?;
    if let Err(error) = keep(&path, &seed) {
        warn!("cannot write {}: {error}; after a reboot the seed will be another", path.display());
    }
    Ok(seed)
}

/// Where systemd has the agent keep what outlives a reboot (systemd.exec(5), `StateDirectory=`).
#[must_use]
pub fn state_directory() -> Option<PathBuf> {
    let directories = env::var_os("STATE_DIRECTORY")?;
    env::split_paths(&directories).next()
}

/// For the agent's user only, and whole or not at all.
fn keep(path: &Path, seed: &Seed) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    for word in seed.words() {
        write!(file, "{word:016x}")?;
    }
    writeln!(file)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// What [`keep`] has written.
fn parse(text: &str) -> Option<Seed> {
    let digits = text.trim_end();
    if digits.len() != SEED_WORDS * WORD_DIGITS || !digits.is_ascii() {
        return None;
    }
    let mut words = [0; SEED_WORDS];
    for (word, at) in words.iter_mut().zip((0..).step_by(WORD_DIGITS)) {
        *word = u64::from_str_radix(&digits[at..at + WORD_DIGITS], 16).ok()?;
    }
    Some(Seed::new(words))
}

/// A seed that is not known outside, from the kernel's generator.
///
/// # Errors
///
/// The kernel gives no random numbers.
pub fn random() -> io::Result<Seed> {
    let mut words = [0_u64; SEED_WORDS];
    for word in &mut words {
        *word = getrandom::u64()?;
    }
    Ok(Seed::new(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_texts_when_made_into_seeds_then_they_are_the_same_for_the_same_text_only() {
        let [one, again, other] =
            ["red apples 2026-11", "red apples 2026-11", "red apples 2026-12"].map(SharedSeed::of);
        assert_eq!(one, again);
        assert_ne!(one.seed(), other.seed());
        assert_ne!(one.to_string(), other.to_string());
        assert!(one.seed().words().iter().all(|word| word % 2 == 1), "no word loses bits");
    }

    /// Gateways of other versions, and on other machines, have to make the same: sha512sum says so.
    #[test]
    fn given_a_text_when_made_into_a_seed_then_its_words_are_those_of_sha_512() {
        let seed = SharedSeed::of("red apples 2026-11");
        let expected = [
            0xf0a6_ba17_4d56_4a87,
            0xfc99_043c_23ff_22c1,
            0x4a2b_258c_1359_9179,
            0x418a_3b7d_50ee_9df7,
            0xba77_6a39_5250_da97,
        ];
        assert_eq!(seed.seed().words(), &expected);
        assert_eq!(seed.to_string(), "eb54882e");
    }

    #[test]
    fn given_an_installation_when_asked_again_then_its_seed_is_the_same_and_only_its_users() {
        use std::os::unix::fs::PermissionsExt as _;

        let directory = tempfile::tempdir().unwrap();
        let first = of_installation(Some(directory.path())).unwrap();
        assert_eq!(of_installation(Some(directory.path())).unwrap(), first);
        let path = directory.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_ne!(of_installation(None).unwrap(), first);
        for wrong in ["", "no seed", &"g".repeat(80), &"é".repeat(40)] {
            fs::write(&path, wrong).unwrap();
            let drawn = of_installation(Some(directory.path())).unwrap();
            assert_ne!(drawn, first, "{wrong:?}");
            assert_eq!(of_installation(Some(directory.path())).unwrap(), drawn, "{wrong:?}");
        }
        let nowhere = directory.path().join("nowhere");
        assert_ne!(
            of_installation(Some(&nowhere)).unwrap(),
            first,
            "a directory that is not there"
        );
    }

    #[test]
    fn given_two_random_seeds_when_compared_then_they_differ() {
        assert_ne!(random().unwrap(), random().unwrap());
    }
}
