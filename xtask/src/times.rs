//! What took how long.

use std::time::{Duration, Instant};

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};

/// The parts of a command, in their order.
#[derive(Debug)]
pub(crate) struct Times {
    began: Instant,
    parts: Vec<(&'static str, Duration, bool)>,
}

impl Times {
    /// Nothing has been done yet.
    pub(crate) fn start() -> Self {
        Self { began: Instant::now(), parts: Vec::new() }
    }

    /// Does a part, and notes how long that takes and whether it succeeds.
    ///
    /// # Errors
    ///
    /// Those of the part.
    pub(crate) fn part<T>(
        &mut self,
        name: &'static str,
        part: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let began = Instant::now();
        let result = part();
        self.parts.push((name, began.elapsed(), result.is_ok()));
        result
    }

    /// Prints the table.
    pub(crate) fn print(&self) {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(["part", "seconds", "result"]);
        for (name, took, succeeded) in &self.parts {
            let result = if *succeeded { "ok" } else { "FAILED" };
            table.add_row([*name, &format!("{:.0}", took.as_secs_f64()), result]);
        }
        let all = self.began.elapsed().as_secs_f64();
        table.add_row(["all", &format!("{all:.0}"), ""]);
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("\n{table}");
    }
}
