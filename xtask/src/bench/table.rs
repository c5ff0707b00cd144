//! The results as Markdown.

use comfy_table::{CellAlignment, Table, presets};

use super::{Row, attack, control, end_to_end};

/// Group of the frames that are really sent.
const LIVE: &str = "live";

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Single packets.
pub(super) fn packets(rows: &[Row]) -> String {
    let hot = rows.iter().find(|row| row.name == "one LRU look-up, 1 flow");
    let unit = hot.map_or(f64::NAN, |row| row.median);
    let mut table = table(&["path", "flows", "median ns", "p10 ns", "LRU look-ups", "verdict"]);
    for row in rows.iter().filter(|row| row.group != LIVE) {
        table.add_row([
            row.name.clone(),
            row.flows.to_string(),
            format!("{:.0}", row.median),
            format!("{:.0}", row.p10),
            format!("{:.2}", row.median / unit),
            row.verdict.clone().unwrap_or_default(),
        ]);
    }
    format!("{table}\n")
}

/// Frames that are really sent, of all that is the harness's: in each round as a part of what a redirect
/// alone lets through.
pub(super) fn live(rows: &[Row]) -> String {
    let mut table = table(&["live frames", "million/s", "of redirect only"]);
    let Some(only) = rows.iter().find(|row| row.name == "redirect only") else {
        return String::new();
    };
    for row in rows.iter().filter(|row| row.group == LIVE) {
        let mut parts: Vec<f64> =
            only.rounds.iter().zip(&row.rounds).map(|(only, own)| only / own).collect();
        parts.sort_by(f64::total_cmp);
        table.add_row([
            row.name.clone(),
            format!("{:.2}", 1_000.0 / row.median),
            format!("{:.0} %", 100.0 * parts[parts.len() / 2]),
        ]);
    }
    format!("{table}\n")
}

/// The agent with a large configuration.
pub(super) fn control(rows: &[control::Row]) -> String {
    let mut table = table(&["", "median ms", "longest ms"]);
    for row in rows {
        let number = |value: f64| format!("{value:.0}");
        table.add_row([row.what.clone(), number(row.median), number(row.longest)]);
    }
    format!("{table}\n")
}

/// Clients through the lab.
pub(super) fn end_to_end(rows: &[end_to_end::Row]) -> String {
    let mut table = table(&[
        "through",
        "Gbit/s",
        "requests/s",
        "p50 µs",
        "p99 µs",
        "connections/s",
        "p50 µs",
        "p99 µs",
    ]);
    for row in rows {
        let number = |value: f64| format!("{value:.0}");
        table.add_row([
            row.through.clone(),
            format!("{:.1}", row.gigabits),
            number(row.kept.per_second),
            number(row.kept.p50),
            number(row.kept.p99),
            number(row.closed.per_second),
            number(row.closed.p50),
            number(row.closed.p99),
        ]);
    }
    format!("{table}\n")
}

/// Clients under attack.
pub(super) fn attacks(rows: &[attack::Row]) -> String {
    let mut table = table(&[
        "attack",
        "packets/s",
        "new connections",
        "answered",
        "worst listener",
        "held",
        "lost",
        "ns per packet",
    ]);
    for row in rows {
        let (listener, part) = &row.worst;
        table.add_row([
            row.attack.clone(),
            format!("{:.0}", row.rate),
            row.new.to_string(),
            format!("{:.2} %", 100.0 * row.answered),
            format!("{listener}: {:.2} %", 100.0 * part),
            row.held.to_string(),
            row.lost.to_string(),
            format!("{:.0}", row.nanoseconds),
        ]);
    }
    format!("{table}\n")
}
