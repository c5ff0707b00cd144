//! What the packet path may cost: `xtask/budget.toml`.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

use super::measure::{Measured, Program, STACK_LIMIT, Subprogram};

const HEAD: &str = "\
# What the packet path may cost. `cargo xtask verify` fails when something costs more, and
# `cargo xtask verify --record` writes what it costs now, after a change that is worth it.
#
# Instructions may grow by `margin_percent` before that happens. Stack (bytes) may not; a subprogram that is
# not named here has none. Calls to memcpy and its like are never allowed. With another `compiler`, and outside
# of CI, what is too much is only reported.
# `stack` of a program is that of its deepest chain of calls, of 512. `jited` (bytes) counts only
# in virtual machines, whose processor is everywhere the same.
";
const MARGIN_PERCENT: u32 = 3;

/// The file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Budget {
    compiler: String,
    margin_percent: u32,
    program: BTreeMap<String, Limits>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    instructions: u32,
    stack: u32,
    /// By series.
    kernel: BTreeMap<String, Kernel>,
    subprogram: BTreeMap<String, Subprogram>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kernel {
    translated: u32,
    verified: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    jited: Option<u32>,
}

impl Budget {
    /// # Errors
    ///
    /// The file cannot be read, or is not one.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        toml::from_str(&text).with_context(|| path.display().to_string())
    }

    /// Whose code it is for.
    pub(super) fn compiler(&self) -> &str {
        &self.compiler
    }

    /// What `measured` costs; on kernels that were not measured it is what `old` says.
    pub(super) fn record(old: Option<Self>, compiler: &str, measured: &[(Measured, Jit)]) -> Self {
        let mut budget = Self {
            compiler: compiler.to_owned(),
            margin_percent: old.as_ref().map_or(MARGIN_PERCENT, |old| old.margin_percent),
            program: BTreeMap::new(),
        };
        let mut old = old.map(|old| old.program).unwrap_or_default();
        for (measured, jit) in measured {
            for (name, program) in &measured.programs {
                let limits = budget.program.entry(name.clone()).or_insert_with(|| Limits {
                    kernel: old.remove(name).unwrap_or_default().kernel,
                    ..Limits::default()
                });
                limits.add(&measured.kernel, program, *jit);
            }
        }
        budget
    }

    /// # Errors
    ///
    /// The disk is full.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).context("writing TOML")?;
        fs::write(path, format!("{HEAD}\n{text}")).with_context(|| path.display().to_string())
    }

    /// Prints what was found beside what is allowed, and gives what is too much.
    pub(super) fn compare(&self, measured: &Measured, jit: Jit) -> Vec<String> {
        let lines = self.lines(measured, jit);
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["", "found", "budget", ""]);
        for line in &lines {
            let limit = line.limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string());
            let state = if line.is_too_much() { "TOO MUCH" } else { "" };
            table.add_row([&line.what, &line.found.to_string(), &limit, state]);
        }
        for column in table.column_iter_mut().skip(1).take(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("\nThe packet path on Linux {}:\n{table}", measured.kernel);
        let too_much = lines.into_iter().filter(Line::is_too_much);
        too_much.map(|line| line.complaint(&measured.kernel)).collect()
    }

    fn lines(&self, measured: &Measured, jit: Jit) -> Vec<Line> {
        let none = Limits::default();
        let mut lines = Vec::new();
        for (name, program) in &measured.programs {
            let limits = self.program.get(name).unwrap_or(&none);
            let kernel = limits.kernel.get(&measured.kernel);
            let mut line = |what: String, found, limit| lines.push(Line { what, found, limit });
            let grown = |value: u32| value + value * self.margin_percent / 100;
            let count = format!("{name}: instructions");
            line(
                format!("{count}, object"),
                program.instructions,
                Some(grown(limits.instructions)),
            );
            let translated = kernel.map(|kernel| grown(kernel.translated));
            line(format!("{count}, translated"), program.translated, translated);
            let verified = kernel.map(|kernel| grown(kernel.verified));
            line(format!("{count}, verified"), program.verified, verified);
            let jited = kernel.and_then(|kernel| kernel.jited).filter(|_| jit == Jit::Counts);
            line(format!("{name}: bytes of machine code"), program.jited, jited.map(grown));
            let stack = limits.stack.min(STACK_LIMIT);
            line(format!("{name}: stack, deepest chain"), program.stack, Some(stack));
            for (function, found) in &program.subprograms {
                let limit = limits.subprogram.get(function).copied().unwrap_or_default();
                line(format!("  {function}: stack"), found.stack, Some(limit.stack));
                if found.copies > 0 {
                    let what = format!("  {function}: calls of memcpy and the like");
                    line(what, found.copies, Some(0));
                }
            }
        }
        lines
    }
}

impl Limits {
    fn add(&mut self, kernel: &str, program: &Program, jit: Jit) {
        self.instructions = self.instructions.max(program.instructions);
        self.stack = self.stack.max(program.stack);
        let Program { translated, verified, .. } = *program;
        let jited = (jit == Jit::Counts).then_some(program.jited);
        self.kernel.insert(kernel.to_owned(), Kernel { translated, verified, jited });
        for (name, found) in &program.subprograms {
            let limit = self.subprogram.entry(name.clone()).or_default();
            limit.stack = limit.stack.max(found.stack);
        }
        self.subprogram.retain(|_, limit| limit.stack != 0);
    }
}

/// Whether the size of machine code says something: it depends on the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Jit {
    /// A known processor.
    Counts,
    /// The processor of this machine, which may differ.
    Varies,
}

struct Line {
    what: String,
    found: u32,
    /// `None`: shown only.
    limit: Option<u32>,
}

impl Line {
    fn is_too_much(&self) -> bool {
        self.limit.is_some_and(|limit| self.found > limit)
    }

    fn complaint(&self, kernel: &str) -> String {
        let limit = self.limit.unwrap_or_default();
        format!("Linux {kernel}: {}: {}, but only {limit} allowed", self.what.trim(), self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured() -> Measured {
        let subprograms = BTreeMap::from([
            ("slb".to_owned(), Subprogram { stack: 200, copies: 0 }),
            ("slb::far".to_owned(), Subprogram { stack: 100, copies: 0 }),
            ("memset".to_owned(), Subprogram::default()),
        ]);
        let program = Program {
            instructions: 1000,
            translated: 2000,
            jited: 9000,
            verified: 3000,
            stack: 352,
            subprograms,
        };
        let programs = BTreeMap::from([("slb".to_owned(), program)]);
        Measured { kernel: "6.1".to_owned(), programs }
    }

    fn complaints(change: impl FnOnce(&mut Measured)) -> Vec<String> {
        let budget = Budget::record(None, "rustc", &[(measured(), Jit::Counts)]);
        let mut now = measured();
        change(&mut now);
        budget.compare(&now, Jit::Counts)
    }

    fn slb(measured: &mut Measured) -> &mut Program {
        measured.programs.get_mut("slb").expect("as above")
    }

    fn set(measured: &mut Measured, subprogram: &str, stack: u32, copies: u32) {
        slb(measured).subprograms.insert(subprogram.to_owned(), Subprogram { stack, copies });
    }

    #[test]
    fn given_a_recorded_budget_when_nothing_or_little_changes_then_it_holds() {
        assert!(complaints(|_| ()).is_empty());
        assert!(complaints(|now| slb(now).instructions = 1030).is_empty());
        assert!(complaints(|now| slb(now).jited = 1).is_empty());
    }

    #[test]
    fn given_a_recorded_budget_when_anything_grows_too_far_then_that_is_named() {
        type Change = fn(&mut Measured);
        let cases: [(Change, &str); 8] = [
            (|now| slb(now).instructions = 1031, "instructions, object: 1031, but only 1030"),
            (|now| slb(now).translated = 2061, "translated: 2061, but only 2060"),
            (|now| slb(now).verified = 3091, "verified: 3091, but only 3090"),
            (|now| slb(now).jited = 9271, "machine code: 9271, but only 9270"),
            (|now| slb(now).stack = 353, "deepest chain: 353, but only 352"),
            (|now| set(now, "slb", 208, 0), "slb: stack: 208, but only 200"),
            (
                |now| set(now, "slb::far", 0, 2),
                "slb::far: calls of memcpy and the like: 2, but only 0",
            ),
            (
                |now| set(now, "slb::new", 0, 1),
                "slb::new: calls of memcpy and the like: 1, but only 0",
            ),
        ];
        for (change, expected) in cases {
            let complaints = complaints(change);
            assert_eq!(complaints.len(), 1, "{complaints:?}");
            assert!(complaints[0].contains(expected), "{complaints:?}");
        }
    }

    #[test]
    fn given_a_kernel_without_a_budget_when_compared_then_only_what_it_does_not_decide_counts() {
        let complaints = complaints(|now| {
            now.kernel = "6.2".to_owned();
            slb(now).translated = 9999;
            slb(now).stack = 400;
        });
        assert_eq!(complaints.len(), 1, "{complaints:?}");
    }

    #[test]
    fn given_a_program_that_is_not_in_the_budget_when_compared_then_it_fails() {
        let complaints = complaints(|now| {
            let program = slb(now).clone();
            now.programs.insert("other".to_owned(), program);
        });
        assert!(complaints.iter().any(|complaint| complaint.contains("other")));
    }

    #[test]
    fn given_another_kernel_when_recorded_then_the_numbers_of_the_first_stay() {
        let mut other = measured();
        other.kernel = "6.18".to_owned();
        let first = Budget::record(None, "rustc", &[(measured(), Jit::Counts)]);
        let both = Budget::record(Some(first), "rustc", &[(other, Jit::Varies)]);
        let text = toml::to_string(&both).unwrap();
        let read: Budget = toml::from_str(&text).unwrap();
        let kernels = &read.program["slb"].kernel;
        assert_eq!(kernels["6.1"].jited, Some(9000));
        assert_eq!(kernels["6.18"].jited, None);
    }
}
