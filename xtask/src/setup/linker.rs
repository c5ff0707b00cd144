//! `bpf-linker`, built against an LLVM that reads what the toolchain writes.
//!
//! Bitcode is read by the same LLVM or a newer one, never by an older one.

use std::{fs, path::Path, process::Command};

use super::{
    Options, apt, compiler,
    report::{Report, say},
    survey::Cost,
};
use crate::process;

const NAME: &str = "bpf-linker";
const VERSION: &str = "0.13.0";
/// Releases of this series take the same arguments.
const SERIES: &str = "0.13.";
/// The LLVM versions that it can be built against, oldest first.
const SUPPORTED: [u32; 3] = [21, 22, 23];
/// The oldest of them: a compiler with an older one is of no use.
pub(super) const OLDEST_LLVM: u32 = SUPPORTED[0];
/// The LLVM inside the binaries that the project publishes.
const PUBLISHED: u32 = 23;
const THING: &str = "linker";

/// Without LLVM, which comes as a package.
pub(super) const COST: Cost = Cost::megabytes(37, 42);

/// Finds or installs the linker for `toolchain`; without one there is nothing to match.
pub(super) fn ensure(toolchain: Option<&str>, options: &Options, report: &mut Report) {
    let Some(wanted) = toolchain.and_then(compiler::llvm) else {
        let again = ["cargo xtask setup    # again, for the linker".to_owned()];
        report.missing(THING, "waits for the toolchain, whose LLVM it has to match", again);
        return;
    };
    match state(wanted) {
        Ok(found) => return report.found(THING, found),
        Err(why) => say(THING, &why),
    }
    if let Err((why, command)) = install(wanted, options) {
        return report.missing(THING, why, [command]);
    }
    match state(wanted) {
        Ok(found) => report.installed(THING, found),
        Err(why) => report.missing(
            THING,
            format!("installed, but {why}"),
            [format!("remove the {NAME} that comes first in the PATH")],
        ),
    }
}

/// Whether no linker is there that the toolchain can use.
pub(super) fn is_missing() -> bool {
    let wanted = compiler::usable().and_then(compiler::llvm);
    wanted.is_none_or(|wanted| state(wanted).is_err())
}

/// The package with the LLVM that the linker is to be built against, unless one is there that does.
pub(super) fn package(wanted: u32) -> Option<String> {
    let is_known = SUPPORTED.contains(&wanted);
    let is_needed = state(wanted).is_err() && installed_llvm(wanted).is_none();
    (is_known && is_needed).then(|| format!("llvm-{wanted}-dev"))
}

/// What [`ensure`] installs.
pub(super) fn name() -> String {
    format!("{NAME} {VERSION}")
}

/// What is there, or why it does not do.
fn state(wanted: u32) -> Result<String, String> {
    let path = process::find(NAME).ok_or("missing")?;
    let version = process::output(&path.display().to_string(), &["--version"])
        .ok_or_else(|| format!("{} does not run", path.display()))?;
    let version = version.split_whitespace().last().unwrap_or_default();
    if !version.starts_with(SERIES) {
        return Err(format!("{} is {version}, {VERSION} is needed", path.display()));
    }
    let llvm = linked_llvm(&path).unwrap_or(PUBLISHED);
    if llvm < wanted {
        return Err(format!(
            "{} has LLVM {llvm}, which cannot read the bitcode of the toolchain's LLVM {wanted}",
            path.display()
        ));
    }
    Ok(format!("{}, {version}, LLVM {llvm} for the toolchain's LLVM {wanted}", path.display()))
}

/// Major version of the `libLLVM.so.N.M` or `libLLVM-N.so` that a program needs; `None` if LLVM is
/// part of the program itself.
fn linked_llvm(program: &Path) -> Option<u32> {
    const LIBRARY: &[u8] = b"libLLVM";
    let bytes = fs::read(program).ok()?;
    let names = bytes.windows(LIBRARY.len()).enumerate().filter(|(_, window)| *window == LIBRARY);
    names
        .filter_map(|(at, _)| {
            let digits: String = bytes[at + LIBRARY.len()..]
                .iter()
                .take(16)
                .skip_while(|byte| !byte.is_ascii_digit())
                .take_while(|byte| byte.is_ascii_digit())
                .map(|&byte| char::from(byte))
                .collect();
            digits.parse().ok()
        })
        .find(|version| (10..100).contains(version))
}

/// Installs a linker with LLVM `wanted` or newer; an error has a reason and a command for the user.
fn install(wanted: u32, options: &Options) -> Result<(), (String, String)> {
    if let Some(llvm) = installed_llvm(wanted) {
        return from_source(llvm);
    }
    if SUPPORTED.last().is_some_and(|&newest| wanted > newest) {
        let why = format!("{NAME} {VERSION} knows no LLVM {wanted}; an older toolchain is needed");
        return Err((why, "cargo xtask setup --from distribution".to_owned()));
    }
    say(THING, &format!("LLVM {wanted} is not installed here; trying the distribution's"));
    let package = format!("llvm-{wanted}-dev");
    apt::install(&[&package], options.allow_upgrades).map_err(|why| {
        let command = process::text(&cargo_install(wanted));
        let llvm = prefix(wanted);
        (format!("no {package}: {why}"), format!("{command}    # with LLVM {wanted} in {llvm}"))
    })?;
    from_source(wanted)
}

/// The oldest LLVM that is installed here and reads the toolchain's bitcode.
fn installed_llvm(wanted: u32) -> Option<u32> {
    SUPPORTED.into_iter().find(|&llvm| llvm >= wanted && has_llvm(llvm))
}

fn has_llvm(llvm: u32) -> bool {
    // Debian has the program and the library in two packages.
    let prefix = prefix(llvm);
    let has = |file: &str| Path::new(&prefix).join(file).exists();
    has("bin/llvm-config") && (has("lib/libLLVM.so") || has(&format!("lib/libLLVM-{llvm}.so")))
}

fn prefix(llvm: u32) -> String {
    format!("/usr/lib/llvm-{llvm}")
}

fn from_source(llvm: u32) -> Result<(), (String, String)> {
    let mut command = cargo_install(llvm);
    say(THING, &format!("installing, against LLVM {llvm} (takes about a minute)"));
    process::run(&mut command).map_err(|error| (format!("{error:#}"), process::text(&command)))
}

fn cargo_install(llvm: u32) -> Command {
    let feature = format!("llvm-{llvm}");
    let mut command =
        process::cargo(["install", NAME, "--version", VERSION, "--locked", "--force"]);
    command.args(["--no-default-features", "--features", &feature]);
    command.env("LLVM_PREFIX", prefix(llvm));
    // Its own place: a caller's target directory is for this repository.
    command.env_remove("CARGO_TARGET_DIR");
    command
}
