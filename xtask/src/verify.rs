//! `cargo xtask verify`: what the packet path costs, and that every supported kernel takes it.
//!
//! Here and in virtual machines the program is loaded and compared with `budget.toml`. Verdict tests run in
//! the virtual machines only, because `cargo xtask test` runs them here anyway: one per program and mode,
//! which is what another kernel can get wrong, or all of them with `--full`.

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
pub(crate) struct Options {
    /// Write what was found as the new budget
    #[arg(long)]
    record: bool,
    /// Leave out the verdict tests: other kernels only load the program, which takes seconds
    #[arg(long)]
    no_tests: bool,
    /// All verdict tests on other kernels, which takes minutes, and not one per program and mode
    #[arg(long, conflicts_with = "no_tests")]
    full: bool,
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

/// One verdict test per program and mode. Comments name the programs behind the first that they are for.
const EVERY_KERNEL: [&str; 17] = [
    "table::given_a_small_state_when_frames_arrive_then_each_gets_its_verdict",
    "replies::given_flows_when_backends_answer_then_clients_see_the_vip",
    "flows::given_direct_return_when_a_client_sends_then_only_the_way_is_written_and_answers_are_not_ours",
    // slb_flow
    "flows::turns::given_turns_when_a_flow_goes_on_then_it_keeps_its_backend",
    // slb_tunnel
    "tunnels::given_a_backend_behind_a_tunnel_when_a_packet_arrives_then_it_gets_all_of_it_wrapped",
    // slb_full_nat
    "full_nat::given_full_nat_when_clients_come_then_the_backend_sees_the_gateway_and_they_see_the_vip",
    "full_nat::given_a_vip_of_another_family_when_clients_come_then_they_are_translated_both_ways",
    // slb_proxy
    "proxy_protocol::given_a_proxy_header_when_a_connection_begins_then_it_stands_before_what_the_client_sends",
    "proxy_protocol::given_the_option_when_a_connection_begins_then_it_is_in_all_that_the_backend_may_see_first",
    // slb_slow_path, slb_reentry
    "vlan::given_a_tagged_packet_when_it_is_balanced_then_its_tags_are_kept",
    // slb_fragment
    "fragments::given_a_packet_in_fragments_when_they_arrive_in_turn_then_all_go_where_the_first_does",
    // slb_respond
    "respond::given_no_listener_when_the_policy_is_to_reset_then_what_comes_is_refused",
    // slb_icmp_nat64
    "respond::given_a_packet_above_the_mtu_of_its_way_when_it_may_not_be_fragmented_then_its_sender_is_told",
    // slb_icmp
    "icmp::given_a_flow_when_its_packets_cannot_be_delivered_then_the_client_is_told_in_its_own_words",
    // slb_policy
    "policy::given_an_access_list_when_clients_come_then_it_says_who_gets_in",
    // slb_scheduler
    "policy::given_persistence_when_a_client_comes_again_then_it_gets_the_same_backend",
    "policy::given_least_connections_when_flows_begin_and_end_then_the_least_loaded_is_chosen",
];

/// Which verdict tests run in virtual machines.
#[derive(Clone, Copy, Debug)]
enum Tests {
    No,
    Some,
    All,
}

/// Measures, compares or records, and runs the verdict tests on other kernels.
///
/// # Errors
///
/// A kernel refuses the program, a test fails in a virtual machine, or something is over the budget.
pub(crate) fn run(options: &Options) -> Result<()> {
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
    let tests = match options {
        Options { no_tests: true, .. } => Tests::No,
        Options { full: true, .. } => Tests::All,
        _ => Tests::Some,
    };
    let found = measure_everywhere(tests)?;
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

/// On the running kernel, and on those of [`KERNELS`], where `tests` run as well.
fn measure_everywhere(tests: Tests) -> Result<Vec<(Measured, Jit)>> {
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

fn in_machine(kernel: &Kernel, object: &Path, tests: Tests) -> Result<Measured> {
    let mut steps = vec![Step {
        name: "measure",
        program: std::env::current_exe().context("where this program is")?,
        args: vec!["verify", "--measure", OBJECT],
    }];
    let names: &[&str] = match tests {
        Tests::Some => &EVERY_KERNEL,
        Tests::No | Tests::All => &[],
    };
    if !matches!(tests, Tests::No) {
        let mut args = vec!["--include-ignored", "--test-threads=2"];
        if !names.is_empty() {
            args.push("--exact");
            args.extend(names);
        }
        steps.push(Step { name: "verdicts", program: verdicts()?, args });
    }
    let machine = Machine {
        steps,
        programs: vec!["ip", "ethtool"],
        files: vec![(object.to_owned(), OBJECT)],
        environment: vec![("SLB_FUZZ_CASES", FUZZ_CASES.to_string())],
        modules: vec!["veth"],
    };
    let lines = machine.run(kernel)?;
    for name in names {
        // libtest runs what it knows of them, and does not mind the rest.
        if !lines.contains(&format!("test {name} ... ok")) {
            bail!("there is no verdict test {name} any more, or it did not run");
        }
    }
    let measured = lines.iter().find_map(|line| line.strip_prefix(MEASURED));
    serde_json::from_str(measured.context("nothing was measured")?).context("what was measured")
}

/// The verdict tests, built.
fn verdicts() -> Result<PathBuf> {
    // The same packages as for `cargo xtask test`, so that cargo picks the same features.
    let messages = process::build(["test", "--no-run", "--test", "verdicts"])?;
    let executable = messages
        .iter()
        .filter(|message| message["target"]["name"] == "verdicts")
        .find_map(|message| message["executable"].as_str());
    Ok(executable.context("no executable of the verdict tests")?.into())
}
