//! Builds the eBPF objects that `loader.rs` embeds, once per content of their sources.
//!
//! The objects are kept in `ebpf/` of the target directory, in a folder named by a hash of all that
//! decides what they contain. Debug and release builds, tests, clippy and benches take them from there.
//! `SLB_EBPF_CACHE=DIR` keeps them elsewhere, for instance to share them among clones.

#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

use std::{
    env, fs,
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// The packet path, `slb decap`, and the first program of the benchmarks.
const OBJECTS: [&str; 3] = ["slb", "decap", "prelude"];
/// Set in the process that builds, see [`build`]; names the toolchain.
const BUILD_WITH: &str = "SLB_BUILD_EBPF_WITH";
const CACHE: &str = "SLB_EBPF_CACHE";

fn main() -> Result<()> {
    if let Some(toolchain) = env::var_os(BUILD_WITH) {
        return build(&toolchain.to_string_lossy());
    }
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR")?);
    let root = package.parent().context("the workspace")?;
    for path in ["slb-ebpf", "Cargo.toml", "Cargo.lock", "xtask/src/toolchain.rs"] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    println!("cargo:rerun-if-env-changed={CACHE}");
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR")?);
    let Some(toolchain) = toolchain::find() else {
        bail!("no toolchain can build the eBPF objects: run `cargo xtask setup`");
    };
    let cache = cache(&out)?;
    let kept = cache.join(key(root, toolchain)?);
    fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
    // Cargo builds profiles side by side: the second one waits here and finds the objects of the first.
    let lock = File::create(cache.join("lock")).context("the lock of the kept objects")?;
    lock.lock().context("the lock of the kept objects")?;
    if !kept.exists() {
        // One per clone: cargo names what it builds by paths within the workspace, so that in a common folder it would
        // take a package of one clone for that of another, if it is newer than the sources.
        let mut clone = DefaultHasher::new();
        root.hash(&mut clone);
        let made = cache.join(format!("building-{:016x}", clone.finish()));
        build_in(&made, toolchain)?;
        let fresh = cache.join("fresh");
        let _ = fs::remove_dir_all(&fresh);
        copy(&made, &fresh)?;
        fs::rename(&fresh, &kept).with_context(|| kept.display().to_string())?;
    }
    copy(&kept, &out)
}

/// Where objects are kept: below the target directory, which cargo marks with a file.
fn cache(out: &Path) -> Result<PathBuf> {
    if let Some(folder) = env::var_os(CACHE) {
        return Ok(folder.into());
    }
    let target = out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists());
    Ok(target.context("OUT_DIR is in no target directory")?.join("ebpf"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for name in OBJECTS {
        let from = from.join(name);
        fs::copy(&from, to.join(name)).with_context(|| from.display().to_string())?;
    }
    Ok(())
}

/// A hash of the sources, the flags (which are in this file), the features, the compiler and the linker.
fn key(root: &Path, toolchain: &str) -> Result<String> {
    let mut hash = DefaultHasher::new();
    let mut files =
        ["Cargo.toml", "Cargo.lock", "slb-user/build.rs"].map(|file| root.join(file)).to_vec();
    sources(&root.join("slb-ebpf"), &mut files)?;
    files.sort();
    for file in files {
        file.strip_prefix(root)?.hash(&mut hash);
        fs::read(&file).with_context(|| file.display().to_string())?.hash(&mut hash);
    }
    features().hash(&mut hash);
    env::var_os("CARGO_CFG_TARGET_ARCH").hash(&mut hash);
    for command in [
        Command::new("rustup").args(["run", toolchain, "rustc", "-vV"]),
        Command::new("bpf-linker").arg("--version"),
    ] {
        let output =
            command.output().with_context(|| format!("{command:?}: run `cargo xtask setup`"))?;
        output.stdout.hash(&mut hash);
    }
    Ok(format!("{:016x}", hash.finish()))
}

/// All files below a folder but those that only the host's tests compile.
fn sources(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let only_tests = ["tests.rs", "fixtures.rs", "proptest-regressions"];
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name();
        if only_tests.iter().any(|test| name == *test) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            sources(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn features() -> &'static [&'static str] {
    if env::var_os("CARGO_FEATURE_TRACE").is_some() { &["trace"] } else { &[] }
}

/// Starts this program again to [`build`]. `aya_build` prints all that the inner cargo says as warnings,
/// which cargo repeats with every later build; here they are shown only if it fails.
fn build_in(folder: &Path, toolchain: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let mut command = Command::new(env::current_exe().context("the build script")?);
    command.env(BUILD_WITH, toolchain).env("OUT_DIR", folder);
    if toolchain == toolchain::LINKED {
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    // 32-bit arithmetic and jumps, which every kernel from 5.1 on has: without them each 32-bit number costs
    // two instructions more. `aya_build` sets the flags of the compiler itself, so they go with the profile.
    command
        .env("CARGO_UNSTABLE_PROFILE_RUSTFLAGS", "true")
        .env("CARGO_PROFILE_RELEASE_RUSTFLAGS", "-Ctarget-cpu=v3")
        .env("CARGO_PROFILE_RELEASE_BUILD_OVERRIDE_RUSTFLAGS", "-Cdebuginfo=0");
    let output = command.output().context("starting the build script again")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    let said: Vec<_> =
        said.lines().map(|line| line.strip_prefix("cargo:warning=").unwrap_or(line)).collect();
    bail!(
        "building the eBPF objects failed (`cargo xtask setup` installs what it needs):\n{}\n{}",
        said.join("\n"),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn build(toolchain: &str) -> Result<()> {
    let root_dir = format!("{}/../slb-ebpf", env::var("CARGO_MANIFEST_DIR")?);
    aya_build::build_ebpf(
        [aya_build::Package {
            name: "slb-ebpf",
            root_dir: &root_dir,
            features: features(),
            ..Default::default()
        }],
        aya_build::Toolchain::Custom(toolchain),
    )
}
