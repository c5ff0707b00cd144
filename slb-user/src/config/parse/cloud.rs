//! `docs/cloud.md`, row by row.

use std::{collections::BTreeMap, fs, path::Path};

use super::parse;
use crate::config::Config;

/// The keys of each table of a file.
type Tables = BTreeMap<&'static str, Vec<(String, String)>>;

/// A file in which every key of the table may be written. The listeners: TCP to the default group, UDP, TCP checked by
/// HTTP, and one to a VServer, a full-NAT and a primary/secondary group each.
fn tables() -> Tables {
    let tables: [(&str, &[(&str, &str)]); 14] = [
        ("gateway", &[("interfaces", "[\"eth0\"]")]),
        ("instance", &[("name", "\"shop\""), ("vips", "[\"203.0.113.10\"]")]),
        ("backend", &[("name", "\"web-1\""), ("address", "\"10.0.0.11\"")]),
        ("group", &[]),
        ("member", &[("port", "9001")]),
        ("full", &[]),
        ("pair", &[]),
        ("listener", &[("protocol", "\"tcp\""), ("port", "80"), ("backend_port", "8080")]),
        ("acl", &[]),
        ("limits", &[]),
        ("health_check", &[("port", "8081")]),
        ("udp", &[]),
        ("udp_check", &[]),
        ("http_check", &[]),
    ];
    let own = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    tables.into_iter().map(|(table, pairs)| (table, own(pairs))).collect()
}

fn text(tables: &Tables, is_restricted: bool) -> String {
    let part = |header: &str, table: &str| {
        let pairs = tables[table].iter().map(|(key, value)| format!("{key} = {value}\n"));
        format!("{header}\n{}", pairs.collect::<String>())
    };
    // Direct return keeps the listener's port.
    let is_direct = |value: &str| ["\"dsr\"", "\"ipip\"", "\"gue\""].contains(&value);
    let api = "[[instance.group.backend]]\nname = \"api-1\"\naddress = \"10.0.0.21\"";
    let api = if tables["group"].iter().any(|(_, value)| is_direct(value)) {
        format!("{api}\nport = 82\n")
    } else {
        part(api, "member")
    };
    let listener = "[[instance.listener]]\nprotocol = ";
    let check = "[instance.listener.health_check]";
    let mut parts = vec![
        part("[gateway]", "gateway"),
        part("[[instance]]", "instance"),
        part("[[instance.backend]]", "backend"),
        part("[[instance.group]]\nname = \"api\"", "group"),
        api,
        part("[[instance.group]]\nname = \"full\"\nforwarding = \"full-nat\"", "full"),
        "[[instance.group.backend]]\nname = \"f-1\"\naddress = \"10.0.0.41\"\nport = 9002\n"
            .to_owned(),
        part("[[instance.group]]\nname = \"db\"", "pair"),
        "primary = { name = \"db-1\", address = \"10.0.0.31\", port = 5432 }\n\
         secondary = { name = \"db-2\", address = \"10.0.0.32\", port = 5432 }\n"
            .to_owned(),
        part("[[instance.listener]]", "listener"),
        part("[instance.listener.limits]", "limits"),
        part(check, "health_check"),
        part(&format!("{listener}\"udp\"\nport = 53\nbackend_port = 5353"), "udp"),
        part(check, "udp_check"),
        format!("{listener}\"tcp\"\nport = 81\nbackend_port = 8080\n"),
        part(&format!("{check}\ntype = \"http\""), "http_check"),
    ];
    if is_restricted {
        parts.insert(10, part("[instance.listener.acl]", "acl"));
    }
    for (port, group) in [(82, "api"), (83, "full"), (84, "db")] {
        parts.push(format!("{listener}\"tcp\"\nport = {port}\ngroup = \"{group}\"\n"));
    }
    parts.concat()
}

/// What the file with `key` at this value says; `None`: without it.
fn read(key: &str, value: Option<&str>) -> Result<Config, String> {
    let (table, name) = key.split_once('.').expect("table and key");
    let mut tables = tables();
    let pairs = tables.get_mut(table).unwrap_or_else(|| panic!("no table for {key}"));
    pairs.retain(|(known, _)| known != name);
    pairs.extend(value.map(|value| (name.to_owned(), value.to_owned())));
    let mut put = |table: &str, key: &str, value: &str| {
        tables.get_mut(table).expect("a table").push((key.to_owned(), value.to_owned()));
    };
    // What goes with it.
    match (key, value) {
        ("listener.protocol", Some("\"udp\"")) => put("health_check", "type", "\"udp\""),
        ("acl.mode", _) => put("acl", "sources", "[\"192.0.2.0/24\"]"),
        ("acl.sources", _) => put("acl", "mode", "\"deny\""),
        ("listener.group", Some(_)) => {
            tables.get_mut("listener").expect("a table").retain(|(key, _)| key != "backend_port");
        }
        _ => {}
    }
    let text = text(&tables, table == "acl");
    let read = parse(Path::new("slb.toml"), &text).map(|(config, _)| config);
    read.map_err(|report| format!("{report}\n{text}"))
}

/// The values between backticks.
fn values(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn given_the_fields_of_a_cloud_when_tried_then_ranges_and_defaults_are_those_of_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cloud.md");
    let table = fs::read_to_string(path).unwrap();
    let mut rows = 0;
    for line in table.lines().filter(|line| line.starts_with("| ")).skip(2) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, _, key, accepted, refused, default] = cells[..] else { panic!("{line}") };
        let [key] = values(key)[..] else { panic!("{line}") };
        rows += 1;
        assert!(!values(accepted).is_empty() && !values(refused).is_empty(), "{line}");
        for value in values(accepted) {
            if let Err(report) = read(key, Some(value)) {
                panic!("{key} = {value}: {report}");
            }
        }
        for value in values(refused) {
            let report = read(key, Some(value)).expect_err(&format!("{key} = {value}"));
            let name = key.split_once('.').unwrap().1;
            assert!(report.contains(name), "{key} = {value}: {report}");
        }
        match (default, &values(default)[..]) {
            ("-", _) => assert!(read(key, None).is_err(), "{key} is not required"),
            ("…", _) => drop(read(key, None).unwrap()),
            (_, [value]) => assert_eq!(read(key, None), read(key, Some(value)), "{key}"),
            _ => panic!("{line}"),
        }
    }
    assert!(rows > 35, "{rows} rows");
}
