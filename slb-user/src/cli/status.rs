//! `slb status`.

use comfy_table::{CellAlignment, Table, presets};
use slb_api::{BackendStatus, ListenerStatus, Role, Status};

use super::{Exit, ask::Query};

pub(super) fn status(arguments: &Query) -> anyhow::Result<Exit> {
    arguments.show(async |agent| agent.get("/v1/status").await, render)
}

fn render(status: &Status) -> String {
    let mut text = format!(
        "slb {} (pid {}), up {}, configuration {} (generation {})\n",
        status.version,
        status.pid,
        humantime::format_duration(std::time::Duration::from_secs(status.uptime_seconds)),
        status.config,
        status.generation
    );
    for interface in &status.interfaces {
        let reason = interface.reason.as_ref().map(|reason| format!(" ({reason})"));
        text += &format!(
            "XDP on {}: {}{}\n",
            interface.name,
            interface.mode,
            reason.unwrap_or_default()
        );
    }
    text += &format!(
        "flow table: {} flows, {} MiB\n",
        status.flow_table.capacity,
        status.flow_table.bytes >> 20
    );
    for problem in &status.problems {
        text += &format!("PROBLEM ({}): {}\n", problem.severity, problem.text);
    }
    for instance in &status.instances {
        let vips: Vec<String> = instance.vips.iter().map(ToString::to_string).collect();
        text += &format!("\ninstance {}: {}\n", instance.name, vips.join(", "));
        for listener in &instance.listeners {
            text += &format!(
                "\n  {} to group {} by {}{}\n",
                listener.label(),
                listener.group,
                listener.scheduler,
                if listener.enabled { "" } else { " (disabled)" }
            );
            if !listener.backends.is_empty() {
                text += &lines(&backends(listener), "    ");
            }
        }
    }
    if !status.verdicts.is_empty() {
        let mut table = table(&["verdict", "packets", "bytes"]);
        for (verdict, count) in &status.verdicts {
            table.add_row([verdict.clone(), count.packets.to_string(), count.bytes.to_string()]);
        }
        align(&mut table, &[1, 2]);
        text += &format!("\n{}", lines(&table, ""));
    }
    text
}

fn backends(listener: &ListenerStatus) -> Table {
    let mut table = table(&[
        "backend", "address", "weight", "health", "expected", "share", "flows", "active", "packets",
    ]);
    for backend in &listener.backends {
        table.add_row([
            name(backend),
            backend.endpoint.to_string(),
            number(backend.weight),
            health(backend),
            percent(backend.expected_share),
            percent(backend.share),
            number(backend.flows),
            backend.active_flows.to_string(),
            backend.packets.to_string(),
        ]);
    }
    align(&mut table, &[2, 4, 5, 6, 7, 8]);
    table
}

fn name(backend: &BackendStatus) -> String {
    match backend.role {
        Role::Member => backend.name.clone(),
        role => format!("{} ({role})", backend.name),
    }
}

/// Shown in place of a value that is not known.
const UNKNOWN: &str = "-";

fn number(number: Option<impl ToString>) -> String {
    number.map_or_else(|| UNKNOWN.to_owned(), |number| number.to_string())
}

/// A share as a percentage.
pub(super) fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| UNKNOWN.to_owned(), |share| format!("{:.1} %", share * 100.0))
}

fn health(backend: &BackendStatus) -> String {
    let mut text = backend.health.to_string();
    if let Some(reason) = &backend.reason {
        text += &format!(": {reason}");
    }
    if backend.drains {
        text += match backend.closes_in_seconds {
            None => ", drains".to_owned(),
            Some(0.0) => ", drained".to_owned(),
            Some(seconds) => format!(", drains for {seconds:.0} s"),
        }
        .as_str();
    }
    text
}

pub(super) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    table
}

pub(super) fn align(table: &mut Table, numbers: &[usize]) {
    for &column in numbers {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

pub(super) fn lines(table: &Table, indent: &str) -> String {
    table.to_string().lines().map(|line| format!("{indent}{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::fixtures;

    #[test]
    fn given_a_status_when_rendered_then_it_reads_like_this() {
        let expected = "\
slb 1.2.3 (pid 4711), up 1h 2m 3s, configuration /etc/slb/slb.toml (generation 3)
XDP on wan0: native
XDP on lan0: generic (no XDP in the driver)
flow table: 1048576 flows, 251 MiB
PROBLEM (critical): net.ipv4.ip_forward is 0

instance shop: 203.0.113.10, 2001:db8:113::10

  tcp/80 to group default by tch
     backend            address             weight  health                         expected    share  flows  active  packets
     web-1              10.0.0.1:8080          100  healthy                          87.5 %  100.0 %     12       4      120
     web-2 (secondary)  [2001:db8::2]:8080       7  unhealthy: connection refused    12.5 %        -      0       4        0

 verdict    packets  bytes
 forwarded      120  34567
 not_ours         9    600
";
        assert_eq!(render(&fixtures::status()), expected);
    }

    #[test]
    fn given_a_disabled_listener_when_rendered_then_it_says_so_and_has_no_table() {
        let mut status = fixtures::status();
        let listener = ListenerStatus { enabled: false, ..fixtures::listener(Vec::new()) };
        status.instances[0].listeners = vec![listener];
        let text = render(&status);

        assert!(text.contains("  tcp/80 to group default by tch (disabled)\n"), "{text}");
        assert!(!text.contains("address"), "{text}");
    }

    #[test]
    fn given_no_traffic_when_rendered_then_there_is_no_table_of_verdicts() {
        let status = Status { verdicts: [].into(), ..fixtures::status() };
        let text = render(&status);
        assert!(!text.contains("verdict"), "{text}");
    }

    #[test]
    fn given_shares_when_rendered_then_they_are_percentages() {
        let cases = [
            (Some(0.0), "0.0 %"),
            (Some(1.0 / 3.0), "33.3 %"),
            (Some(1.0), "100.0 %"),
            (None, "-"),
        ];
        for (share, expected) in cases {
            assert_eq!(percent(share), expected);
        }
    }

    #[test]
    fn given_any_table_when_rendered_then_no_line_ends_in_blanks() {
        let text = render(&fixtures::status());
        let bad: Vec<_> = text.lines().filter(|line| line.ends_with(' ')).collect();
        assert!(bad.is_empty(), "{bad:?}");
    }
}
