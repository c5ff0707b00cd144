//! Kernels of Debian.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use object::{Object as _, ObjectSection as _};

use crate::{deb, process, setup::apt};

/// Series that the packet path has to be accepted by. Of each, the newest that the mirror has.
pub(crate) const KERNELS: [&str; 1] = ["6.1"];

/// An unpacked package.
pub(crate) struct Kernel {
    name: String,
    vmlinuz: PathBuf,
    /// `lib/modules/<release>`.
    modules: PathBuf,
}

impl Kernel {
    /// Finds the newest kernel of a series, and downloads it if it is not here yet.
    ///
    /// # Errors
    ///
    /// The mirror has none, or it cannot be downloaded.
    pub(crate) fn fetch(series: &str) -> Result<Self> {
        Self::newest(series).or_else(|_| {
            // There were no lists, or they name what the mirror has dropped.
            apt::refresh();
            Self::newest(series)
        })
    }

    fn newest(series: &str) -> Result<Self> {
        let package =
            newest(series).with_context(|| format!("the mirror has no Linux {series}"))?;
        let (name, folder) = deb::fetch(&package)?;
        Self::open(&folder, name)
    }

    fn open(folder: &Path, name: String) -> Result<Self> {
        let release = deb::only(&folder.join("lib/modules"))?;
        let modules = folder.join("lib/modules").join(&release);
        let vmlinuz = folder.join("boot").join(format!("vmlinuz-{release}"));
        Ok(Self { name, vmlinuz, modules })
    }

    /// Package and version.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What to boot.
    pub(crate) fn vmlinuz(&self) -> &Path {
        &self.vmlinuz
    }

    /// Files of modules with all that they depend on, in the order in which to load them.
    ///
    /// # Errors
    ///
    /// There is no such module.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let list = |name: &str| {
            let path = self.modules.join(name);
            fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let (loadable, builtin) = (list("modules.order")?, list("modules.builtin")?);
        let mut files = Vec::new();
        for name in names {
            self.add_module(name, &loadable, &builtin, &mut files)?;
        }
        Ok(files)
    }

    fn add_module(
        &self,
        name: &str,
        loadable: &str,
        builtin: &str,
        files: &mut Vec<PathBuf>,
    ) -> Result<()> {
        let Some(line) = line_of(loadable, name) else {
            if line_of(builtin, name).is_some() {
                return Ok(());
            }
            bail!("{} has no module {name}", self.name);
        };
        let file = self.modules.join(line);
        if files.contains(&file) {
            return Ok(());
        }
        let bytes = fs::read(&file).with_context(|| file.display().to_string())?;
        for needed in dependencies(&bytes).with_context(|| file.display().to_string())? {
            self.add_module(&needed, loadable, builtin, files)?;
        }
        files.push(file);
        Ok(())
    }
}

/// The newest package of a series, by the numbers in its name.
fn newest(series: &str) -> Option<String> {
    let pattern = format!(r"^linux-image-{}[.]", series.replace('.', "[.]"));
    newest_of(&process::output("apt-cache", &["search", "--names-only", &pattern])?)
}

/// `apt-cache search` also finds kernels for clouds, for real time, and without a signature.
fn newest_of(list: &str) -> Option<String> {
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.ends_with("-amd64"))
        .filter(|name| {
            !["cloud", "rt", "dbg"].iter().any(|kind| name.split('-').any(|part| part == *kind))
        })
        .max_by_key(|name| numbers(name))
        .map(str::to_owned)
}

fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// The line of a list of modules that is about one. Names have `_` where files may have `-`.
fn line_of<'a>(list: &'a str, name: &str) -> Option<&'a str> {
    list.lines().find(|line| {
        let file = line.rsplit('/').next().unwrap_or_default();
        file.strip_suffix(".ko")
            .is_some_and(|stem| stem.replace('-', "_") == name.replace('-', "_"))
    })
}

/// What a module says it needs: Debian makes `modules.dep` on installation only.
fn dependencies(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let section = file.section_by_name(".modinfo").context("no .modinfo")?;
    let info = section.data()?.split(|&byte| byte == 0);
    let depends = info.filter_map(|field| field.strip_prefix(b"depends="));
    let names = depends.flat_map(|names| names.split(|&byte| byte == b','));
    Ok(names
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_packages_when_the_newest_is_sought_then_numbers_count_and_other_kinds_do_not() {
        let list = "linux-image-6.1.0-9-amd64 - Linux 6.1\nlinux-image-6.1.0-50-amd64 - Linux 6.1\n\
                    linux-image-6.1.0-56-cloud-amd64 - Linux 6.1\n\
                    linux-image-6.1.0-56-rt-amd64 - Linux 6.1\nlinux-image-6.1.0-56-amd64-dbg - x\n";
        assert_eq!(newest_of(list).as_deref(), Some("linux-image-6.1.0-50-amd64"));
        assert_eq!(newest_of(""), None);
    }

    #[test]
    fn given_lists_of_modules_when_one_is_sought_then_dashes_are_underscores() {
        let list = "kernel/net/a/nf-tables.ko\nkernel/drivers/net/veth.ko\n";
        assert_eq!(line_of(list, "veth"), Some("kernel/drivers/net/veth.ko"));
        assert_eq!(line_of(list, "nf_tables"), Some("kernel/net/a/nf-tables.ko"));
        assert_eq!(line_of(list, "eth"), None);
    }
}
