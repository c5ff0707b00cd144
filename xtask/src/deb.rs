//! Packages of Debian, unpacked below the target directory; nothing is installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process;

/// Name and version of a package, and where it is unpacked; downloaded if it is not here yet.
///
/// # Errors
///
/// The mirror does not have it, or it cannot be downloaded.
pub(crate) fn fetch(package: &str) -> Result<(String, PathBuf)> {
    let shown = process::output("apt-cache", &["show", "--no-all-versions", package]);
    let version = shown.as_deref().and_then(version).context("a package without a version")?;
    let cache = process::target()?.join("vm");
    let name = format!("{package}_{version}");
    let folder = cache.join(&name);
    if !folder.exists() {
        fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
        unpack(package, &cache, &folder)?;
    }
    Ok((name, folder))
}

fn version(shown: &str) -> Option<&str> {
    shown.lines().find_map(|line| line.strip_prefix("Version: "))
}

fn unpack(package: &str, cache: &Path, folder: &Path) -> Result<()> {
    let scratch = tempfile::tempdir_in(cache).context("making a temporary directory")?;
    let mut download = Command::new("apt-get");
    // apt's own user may not write there.
    download.args(["-q", "-o", "APT::Sandbox::User=root", "download", package]);
    process::run(download.current_dir(scratch.path()))?;
    let deb = scratch.path().join(only(scratch.path())?);
    let files = scratch.path().join("files");
    process::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&files))?;
    fs::rename(&files, folder).with_context(|| folder.display().to_string())
}

/// The name of the only thing in a folder.
///
/// # Errors
///
/// There is none, or it cannot be read.
pub(crate) fn only(folder: &Path) -> Result<String> {
    let context = || folder.display().to_string();
    let mut entries = fs::read_dir(folder).with_context(context)?;
    let entry = entries.next().with_context(context)?.with_context(context)?;
    Ok(entry.file_name().display().to_string())
}
