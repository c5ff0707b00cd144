//! What `cargo xtask run` prints.

use std::{
    io::{IsTerminal as _, stdout},
    time::Instant,
};

/// Prints step by step, and counts what did not hold.
pub(super) struct Report {
    began: Instant,
    steps: u32,
    checks: u32,
    failures: u32,
    colour: bool,
}

impl Default for Report {
    fn default() -> Self {
        let colour = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { began: Instant::now(), steps: 0, checks: 0, failures: 0, colour }
    }
}

impl Report {
    /// What is being done now.
    pub(super) fn step(&mut self, what: &str) {
        self.steps += 1;
        println!("\n{}", self.paint("1", &format!("{}. {what}", self.steps)));
    }

    /// Something that was seen and is neither right nor wrong.
    pub(super) fn seen(&self, what: &str) {
        println!("   {what}");
    }

    /// Something that has to hold.
    pub(super) fn check(&mut self, holds: bool, what: &str) {
        self.checks += 1;
        self.failures += u32::from(!holds);
        println!("   {} {what}", self.verdict(holds));
    }

    fn verdict(&self, holds: bool) -> String {
        self.paint(if holds { "32" } else { "1;31" }, word(holds))
    }

    /// The last lines; returns how many checks failed.
    pub(super) fn close(self) -> u32 {
        let passed = self.checks - self.failures;
        let seconds = self.began.elapsed().as_secs();
        let verdict = self.verdict(self.failures == 0);
        println!("\n{verdict}: {passed} of {} checks held, {seconds} s", self.checks);
        self.failures
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Without colour, which would spoil the widths of a table.
pub(super) fn word(holds: bool) -> &'static str {
    if holds { "ok" } else { "FAILED" }
}
