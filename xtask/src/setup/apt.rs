//! Packages of Debian and of distributions made from it.
//!
//! Nothing that is installed is upgraded or removed. A package that needs that is left out, unless the
//! user allows it by `--allow-upgrades`.

use std::{
    collections::BTreeMap,
    path::Path,
    process::{Command, Stdio},
    sync::{Mutex, Once, PoisonError},
    time::Duration,
};

use super::services::{POLICY, Policy};
use crate::process;

/// The time that `apt-get` has. A mirror that has sent too little by then never will.
const LIMIT: Duration = Duration::from_secs(900);
const INSTALL: [&str; 3] = ["install", "--no-upgrade", "--no-install-recommends"];
/// Otherwise apt upgrades all installed packages that are built from the source of a new one.
const ONLY_NAMED: [&str; 2] = ["-o", "APT::Get::Upgrade-By-Source-Package=false"];

/// Packages that bring a service of the same name, of which only the program is needed: the tests start it.
const SERVICES: [&str; 2] = ["haproxy", "nginx"];

/// Packages that could not be installed, and why: the same question gets the same answer without asking again.
static REFUSED: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

/// What apt would do to install packages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// New packages, dependencies included.
    pub new: Vec<String>,
    /// Installed packages that would be replaced by newer ones.
    pub upgraded: Vec<String>,
    /// Bytes to download.
    pub download: u64,
    /// Bytes on the disk afterwards.
    pub disk: u64,
}

/// Asks apt. Needs no root, changes nothing, and uses the package lists that are there.
///
/// # Errors
///
/// Says why apt cannot install them, in a few words.
pub(crate) fn plan(packages: &[&str]) -> Result<Plan, String> {
    if !is_here() {
        return Err("this is not a Debian-like system".to_owned());
    }
    let mut command = Command::new("apt-get");
    // Not `--assume-no`: apt does not ask, but installs, when there are no more packages than the named ones.
    command.args(INSTALL).args(ONLY_NAMED).args(["--no-remove", "--print-uris"]).args(packages);
    command.args(["-o", "Debug::NoLocking=1"]).env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let error = said.lines().find_map(|line| line.strip_prefix("E: "));
        return Err(error.unwrap_or("apt-get fails").to_owned());
    }
    Ok(read(&String::from_utf8_lossy(&output.stdout)))
}

/// Reads what `apt-get install --print-uris` prints.
fn read(printed: &str) -> Plan {
    let mut plan = Plan::default();
    let mut list: Option<&mut Vec<String>> = None;
    for line in printed.lines() {
        if let Some(names) = line.strip_prefix("  ") {
            if let Some(list) = &mut list {
                list.extend(names.split_whitespace().map(str::to_owned));
            }
            continue;
        }
        list = match line {
            "The following NEW packages will be installed:" => Some(&mut plan.new),
            "The following packages will be upgraded:" => Some(&mut plan.upgraded),
            _ => None,
        };
        if let Some(rest) = line.strip_prefix("After this operation, ")
            && rest.ends_with("additional disk space will be used.")
        {
            plan.disk = bytes(rest);
        }
        // 'http://…' name bytes checksum
        if line.starts_with('\'') {
            let size = line.split_whitespace().nth(2).and_then(|size| size.parse::<u64>().ok());
            plan.download += size.unwrap_or_default();
        }
    }
    plan
}

/// Of `2774 kB …`, as apt writes it.
fn bytes(text: &str) -> u64 {
    let mut words = text.split_whitespace();
    let number = words.next().map(|number| number.replace(',', ""));
    let number: f64 = number.and_then(|number| number.parse().ok()).unwrap_or_default();
    let unit = match words.next() {
        Some("kB") => 1e3,
        Some("MB") => 1e6,
        Some("GB") => 1e9,
        _ => 1.0,
    };
    // Sizes of packages are far from where a float loses digits.
    (number * unit) as u64
}

/// Installs packages, as many of them as can be. Their services are not started, and those of [`SERVICES`] are not
/// started with the machine either. Refreshes the lists first: old ones name versions that the
/// mirrors have dropped.
///
/// # Errors
///
/// Says for the first package that is left out why that is.
pub(crate) fn install(packages: &[&str], allow_upgrades: bool) -> Result<(), String> {
    let refused = |packages: &[&str]| {
        let refused = REFUSED.lock().unwrap_or_else(PoisonError::into_inner);
        packages.iter().find_map(|&package| refused.get(package).cloned()).map_or(Ok(()), Err)
    };
    refused(packages)?;
    if !is_here() {
        return Err("this is not a Debian-like system".to_owned());
    }
    if !process::is_root() {
        return Err("installing packages takes root".to_owned());
    }
    refresh();
    if let Err(why) = attempt(packages, allow_upgrades) {
        if let [package] = packages {
            REFUSED
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert((*package).to_owned(), why.clone());
            return Err(why);
        }
        // One by one: a single package that cannot be had must not keep the others away.
        for package in packages {
            // The reason is kept in REFUSED.
            let _ = install(&[package], allow_upgrades);
        }
    }
    refused(packages)
}

fn attempt(packages: &[&str], allow_upgrades: bool) -> Result<(), String> {
    let mut command = Command::new("apt-get");
    command.args(INSTALL).args(ONLY_NAMED).arg("-y");
    if !allow_upgrades {
        if let Some(why) = refusal(&plan(packages)?) {
            return Err(why);
        }
        command.arg("--no-remove");
    }
    {
        let _policy = Policy::create(Path::new(POLICY))?;
        run(command.args(packages))?;
    }
    for service in packages.iter().filter(|package| SERVICES.contains(package)) {
        run(Command::new("update-rc.d").args([service, "disable"]))?;
    }
    Ok(())
}

/// Why packages are left out, if they are.
fn refusal(plan: &Plan) -> Option<String> {
    (!plan.upgraded.is_empty())
        .then(|| format!("needs newer versions of what is installed: {}", plan.upgraded.join(", ")))
}

/// Brings the package lists up to date, unless this process has done so.
pub(crate) fn refresh() {
    static REFRESH: Once = Once::new();
    REFRESH.call_once(|| {
        if let Err(why) = run(Command::new("apt-get").arg("update")) {
            println!("setup: the package lists stay as they are: {why}");
        }
    });
}

/// What the user would type to install packages, or where to look on another distribution.
pub(crate) fn advice(packages: &[&str]) -> String {
    let packages = packages.join(" ");
    if !is_here() {
        return format!("install what Debian calls: {packages}");
    }
    let sudo = if process::is_root() { "" } else { "sudo " };
    format!("{sudo}apt-get {} {packages}", INSTALL.join(" "))
}

/// Whether the system has apt.
pub(crate) fn is_here() -> bool {
    process::find("apt-get").is_some()
}

fn run(command: &mut Command) -> Result<(), String> {
    command.env("DEBIAN_FRONTEND", "noninteractive");
    process::run_within(command, LIMIT).map_err(|error| format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_the_answer_of_apt_when_it_is_read_then_new_and_upgraded_packages_are_told_apart() {
        let printed = "\
The following packages were automatically installed and are no longer required:
  libaio1 libfdt1
The following additional packages will be installed:
  libsystemd0
The following NEW packages will be installed:
  mmdebstrap
  systemd-container
The following packages will be upgraded:
  libsystemd0 systemd
2 upgraded, 2 newly installed, 0 to remove and 128 not upgraded.
Need to get 1,089 kB of archives.
After this operation, 1,787 kB of additional disk space will be used.
'http://mirror/a_1%7e.deb' a_1~.deb 3000 MD5Sum:9a
'http://mirror/b_1.deb' b_1.deb 500 
";
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let expected = Plan {
            new: names(&["mmdebstrap", "systemd-container"]),
            upgraded: names(&["libsystemd0", "systemd"]),
            download: 3_500,
            disk: 1_787_000,
        };
        assert_eq!(read(printed), expected);
    }

    #[test]
    fn given_packages_that_need_newer_ones_when_they_are_asked_for_then_they_are_refused() {
        let new = || vec!["systemd-container".to_owned()];
        let plan = Plan { new: new(), upgraded: vec!["systemd".to_owned()], ..Plan::default() };
        assert!(refusal(&plan).is_some_and(|why| why.contains("systemd")));
        assert_eq!(refusal(&Plan { new: new(), ..Plan::default() }), None);
    }

    #[test]
    fn given_packages_that_free_space_when_the_answer_is_read_then_they_take_none() {
        let printed = "After this operation, 12 MB disk space will be freed.\n";
        assert_eq!(read(printed), Plan::default());
    }
}
