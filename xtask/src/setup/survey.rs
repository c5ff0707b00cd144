//! `cargo xtask setup --dry-run`: what would be installed, and how large it is.

use comfy_table::{CellAlignment, Table, presets};

use super::{Options, apt, compiler, linker, machine};
use crate::process;

/// What something takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    pub download: u64,
    pub disk: u64,
}

impl Cost {
    /// A cost in megabytes.
    pub(crate) const fn megabytes(download: u64, disk: u64) -> Self {
        Self { download: download * 1_000_000, disk: disk * 1_000_000 }
    }
}

struct Row {
    what: String,
    by: &'static str,
    /// `None`: apt cannot say.
    cost: Option<Cost>,
    /// Printed below the table.
    note: Option<String>,
}

/// Prints what [`super::everything`] would install. Installs and downloads nothing.
pub(super) fn print(options: &Options) {
    let rows = rows(options);
    if rows.is_empty() {
        println!("setup: everything is there, so nothing would be installed");
        return;
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["would be installed", "by", "download", "disk"]);
    let mut all = Cost::default();
    for row in &rows {
        let cells = match row.cost {
            Some(cost) => {
                all.download += cost.download;
                all.disk += cost.disk;
                [megabytes(cost.download), megabytes(cost.disk)]
            }
            None => ["unknown", "unknown"].map(str::to_owned),
        };
        let [download, disk] = cells;
        table.add_row([row.what.clone(), row.by.to_owned(), download, disk]);
    }
    table.add_row(["all".to_owned(), String::new(), megabytes(all.download), megabytes(all.disk)]);
    for column in [2, 3] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{}", table.trim_fmt());
    for note in rows.iter().filter_map(|row| row.note.as_ref()) {
        println!("{note}");
    }
    println!("\nNothing was installed. The build itself takes about 3 GB below `target`.");
}

fn rows(options: &Options) -> Vec<Row> {
    let mut rows = Vec::new();
    let row =
        |what: &str, by, cost| Row { what: what.to_owned(), by, cost: Some(cost), note: None };
    if let Some(command) = compiler::by_rustup(options.from) {
        rows.push(row(&command, "rustup", compiler::COST));
    }
    let packages = super::missing_packages(options);
    let packages: Vec<_> = packages.iter().map(String::as_str).collect();
    if !packages.is_empty() {
        rows.extend(by_apt(&packages, options.allow_upgrades));
    }
    if linker::is_missing() {
        rows.push(row(&linker::name(), "cargo install", linker::COST));
    }
    for helper in super::helpers() {
        if process::find(helper.program).is_none() {
            let what = format!("{} {}", helper.program, helper.version);
            rows.push(row(&what, "pip", helper.cost));
        }
    }
    if machine::is_missing() {
        rows.push(row("Debian 12 in target/machine, for tests", "mmdebstrap", machine::COST));
    }
    rows
}

fn by_apt(packages: &[&str], allow_upgrades: bool) -> Vec<Row> {
    let row = |what: String, cost, note| Row { what, by: "apt-get", cost, note };
    match apt::plan(packages) {
        Ok(plan) if plan.upgraded.is_empty() || allow_upgrades => {
            let cost = Cost { download: plan.download, disk: plan.disk };
            let mut what = packages.join(" ");
            let more = plan.new.len().saturating_sub(packages.len());
            if more > 0 {
                what.push_str(&format!(", which depend on {more} more packages"));
            }
            let note = (!plan.upgraded.is_empty())
                .then(|| format!("apt-get would upgrade: {}", plan.upgraded.join(" ")));
            vec![row(what, Some(cost), note)]
        }
        // As the installation does it: what can be had, without the rest.
        Ok(_) | Err(_) if packages.len() > 1 => {
            packages.iter().flat_map(|&package| by_apt(&[package], allow_upgrades)).collect()
        }
        Ok(plan) => {
            let why = format!(
                "{} would be left out, unless --allow-upgrades is given: it needs newer versions of: {}",
                packages.join(" "),
                plan.upgraded.join(" ")
            );
            vec![row(format!("(not {})", packages.join(" ")), Some(Cost::default()), Some(why))]
        }
        Err(why) => {
            let why = format!("{}: {why}; old package lists? `apt-get update`", packages.join(" "));
            vec![row(packages.join(" "), None, Some(why))]
        }
    }
}

/// Rounded up, so that what is small does not read as nothing.
fn megabytes(bytes: u64) -> String {
    format!("{} MB", bytes.div_ceil(1_000_000))
}
