//! `cargo xtask verify`: what the packet path costs, and that every supported kernel takes it.
//!
//! Here and in virtual machines the program is loaded and compared with `budget.toml`; the verdict tests
//! run in the virtual machines only, because `cargo xtask test` runs them here anyway.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::{
    process, setup, toolchain,
    vm::{KERNELS, Kernel, Machine, Step},
};
use budget::{Budget, Jit};
use measure::Measured;

mod budget;
mod measure;

/// Options of `cargo xtask verify`.
#[derive(Debug, Default, Args)]
pub struct Options {
    /// Write what was found as the new budget
    #[arg(long)]
    record: bool,
    /// Leave out the verdict tests: other kernels only load the program, which takes seconds
    #[arg(long)]
    no_tests: bool,
    /// Only measure this object on the running kernel, and print that; for use in virtual machines
    #[arg(long, value_name = "OBJECT", hide = true, conflicts_with = "record")]
    measure: Option<PathBuf>,
}

/// Comes before what is measured in a virtual machine.
const MEASURED: &str = "measured: ";
/// Where the object is in there.
const OBJECT: &str = "/slb/object";
/// Emulation is slow, and the same cases have been seen here already.
const FUZZ_CASES: u32 = 20_000;

/// Measures, compares or records, and runs the verdict tests on other kernels.
///
/// # Errors
///
/// A kernel refuses the program, a test fails in a virtual machine, or something is over the budget.
pub fn run(options: &Options) -> Result<()> {
    if let Some(object) = &options.measure {
        println!("{MEASURED}{}", serde_json::to_string(&measured(object)?)?);
        return Ok(());
    }
    if !process::is_root() {
        bail!("loading programs takes root");
    }
    setup::ensure(&setup::Options::default())?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("budget.toml");
    let old = file.exists().then(|| Budget::read(&file)).transpose()?;
    let compiler = compiler()?;
    let found = measure_everywhere(!options.no_tests)?;
    let budget = match old {
        Some(budget) if !options.record => budget,
        None if !options.record => bail!("{} is missing", file.display()),
        old => {
            let budget = Budget::record(old, &compiler, &found);
            budget.write(&file)?;
            budget
        }
    };
    let complaints: Vec<_> =
        found.iter().flat_map(|(measured, jit)| budget.compare(measured, *jit)).collect();
    if complaints.is_empty() {
        println!("\nok: the packet path keeps to {}", file.display());
        return Ok(());
    }
    let complaints = complaints.join("\n    ");
    if budget.compiler() != compiler && !is_ci() {
        println!(
            "\nOver the budget, which was recorded with {}, and this is {compiler}:\n    {complaints}",
            budget.compiler()
        );
        return Ok(());
    }
    bail!(
        "the packet path costs more than {} allows; if that is worth it, \
         `cargo xtask verify --record` writes a new one:\n    {complaints}",
        file.display()
    )
}

/// On the running kernel, and on those of [`KERNELS`]; with `tests`, the verdict tests run on the latter.
fn measure_everywhere(tests: bool) -> Result<Vec<(Measured, Jit)>> {
    let object = object()?;
    let mut found = vec![(measured(&object)?, Jit::Varies)];
    for series in KERNELS {
        match setup::virtual_machines().and_then(|()| Kernel::fetch(series)) {
            Ok(kernel) => found.push((in_machine(&kernel, &object, tests)?, Jit::Counts)),
            Err(why) if is_ci() => return Err(why),
            Err(why) => println!("Left out: Linux {series}, which has to take this too: {why:#}"),
        }
    }
    Ok(found)
}

/// Whether nothing may be left out.
fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

/// The compiler of the packet path, whose work most of the numbers are.
fn compiler() -> Result<String> {
    let toolchain = toolchain::find().context("no toolchain")?;
    let about = process::output("rustup", &["run", toolchain, "rustc", "-vV"])
        .with_context(|| format!("{toolchain} has no rustc"))?;
    let field = |name: &str| about.lines().find_map(|line| line.strip_prefix(name));
    match (field("release: "), field("LLVM version: ")) {
        (Some(release), Some(llvm)) => Ok(format!("rustc {release}, LLVM {llvm}")),
        _ => bail!("rustc -vV of {toolchain} tells no version:\n{about}"),
    }
}

fn measured(object: &Path) -> Result<Measured> {
    let bytes = std::fs::read(object).with_context(|| object.display().to_string())?;
    measure::object(&bytes)
}

/// The object that the release build embeds.
fn object() -> Result<PathBuf> {
    let messages = process::build(["build", "--release", "--package", "slb-user"])?;
    let of_slb = |message: &&serde_json::Value| {
        message["reason"] == "build-script-executed"
            && message["package_id"].as_str().is_some_and(|id| id.contains("/slb-user#"))
    };
    let folder = messages.iter().find(of_slb).and_then(|message| message["out_dir"].as_str());
    Ok(Path::new(folder.context("slb-user has no build script")?).join("slb"))
}

fn in_machine(kernel: &Kernel, object: &Path, tests: bool) -> Result<Measured> {
    let mut steps = vec![Step {
        name: "measure",
        program: std::env::current_exe().context("where this program is")?,
        args: vec!["verify", "--measure", OBJECT],
    }];
    if tests {
        steps.push(Step {
            name: "verdicts",
            program: verdicts()?,
            args: vec!["--include-ignored", "--test-threads=2"],
        });
    }
    let machine = Machine {
        steps,
        programs: vec!["ip", "ethtool"],
        files: vec![(object.to_owned(), OBJECT)],
        environment: vec![("SLB_FUZZ_CASES", FUZZ_CASES.to_string())],
        modules: vec!["veth"],
    };
    let lines = machine.run(kernel)?;
    let measured = lines.iter().find_map(|line| line.strip_prefix(MEASURED));
    serde_json::from_str(measured.context("nothing was measured")?).context("what was measured")
}

/// The verdict tests, built.
fn verdicts() -> Result<PathBuf> {
    let messages =
        process::build(["test", "--no-run", "--package", "slb-tests", "--test", "verdicts"])?;
    let executable = messages
        .iter()
        .filter(|message| message["target"]["name"] == "verdicts")
        .find_map(|message| message["executable"].as_str());
    Ok(executable.context("no executable of the verdict tests")?.into())
}
