//! Whether the kernel would forward packets at all.
//!
//! XDP asks the kernel's forwarding tables, which answer only where forwarding is switched on, and
//! hands packets to the kernel whose next hop is not known yet.

use std::{fs, path::Path};

use super::Interface;

const SYSCTLS: &str = "/proc/sys";

/// What keeps the kernel from forwarding between these interfaces, each with the setting to make.
///
/// Empty if nothing does. A protocol that the kernel does not have is no problem.
#[must_use]
pub fn forwarding_problems(interfaces: &[Interface]) -> Vec<String> {
    problems(Path::new(SYSCTLS), interfaces)
}

/// What keeps the kernel from forwarding IPv4 packets that come in by these interfaces and whose
/// source is an address of this host, as replies have that XDP has to leave to it.
#[must_use]
pub fn local_source_problems<'a>(interfaces: impl Iterator<Item = &'a str>) -> Vec<String> {
    interfaces.flat_map(|name| local_source_problem(Path::new(SYSCTLS), name)).collect()
}

fn local_source_problem(root: &Path, interface: &str) -> Vec<String> {
    let path = |scope: &str, name: &str| format!("net/ipv4/conf/{scope}/{name}");
    let level = |name| {
        let of = |scope| fs::read_to_string(root.join(path(scope, name))).ok();
        let values = [of("all"), of(interface)].into_iter().flatten();
        values.filter_map(|value| value.trim().parse::<u32>().ok()).max()
    };
    let what = "the kernel drops IPv4 replies that were left to it";
    let mut problems = Vec::new();
    if level("accept_local") == Some(0) {
        problems.push(problem(what, &path(interface, "accept_local")));
    }
    // The larger one of the two counts: strict (1) is more than none, and less than loose (2).
    if level("rp_filter") == Some(1) {
        let path = path(interface, "rp_filter");
        problems.push(format!("{what}; set it with: sysctl -w {path}=2"));
    }
    problems
}

/// Whether IPv6 treats the interface as a router's; its neighbours are told so.
pub(super) fn is_router(interface: &str) -> bool {
    let path = format!("net/ipv6/conf/{interface}/forwarding");
    is_on(Path::new(SYSCTLS), &path) == Some(true)
}

fn problems(root: &Path, interfaces: &[Interface]) -> Vec<String> {
    let families = [
        ("IPv4", "net/ipv4/ip_forward", "net/ipv4/conf"),
        ("IPv6", "net/ipv6/conf/all/forwarding", "net/ipv6/conf"),
    ];
    let mut problems = Vec::new();
    for (family, everywhere, each) in families {
        if is_on(root, everywhere) == Some(false) {
            problems.push(problem(&format!("{family} forwarding is off"), everywhere));
            continue;
        }
        for Interface { name, .. } in interfaces {
            let path = format!("{each}/{name}/forwarding");
            if is_on(root, &path) == Some(false) {
                problems.push(problem(&format!("{family} forwarding is off on {name}"), &path));
            }
        }
    }
    problems
}

fn problem(what: &str, path: &str) -> String {
    // Slashes work for every name of an interface; with dots, `eth0.5` would be ambiguous.
    format!("{what}; set it with: sysctl -w {path}=1")
}

/// `None`: there is no such setting.
fn is_on(root: &Path, path: &str) -> Option<bool> {
    fs::read_to_string(root.join(path)).ok().map(|value| value.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(values: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, value) in values {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    #[test]
    fn given_settings_when_checked_then_what_is_off_is_named_with_its_sysctl() {
        let (v4, v6) = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding");
        let lan = "net/ipv4/conf/lan0/forwarding";
        let cases = [
            ("all on", vec![(v4, "1"), (v6, "1"), (lan, "1")], vec![]),
            ("IPv4 off", vec![(v4, "0"), (v6, "1"), (lan, "0")], vec![v4]),
            ("IPv6 off", vec![(v4, "1"), (v6, "0"), (lan, "1")], vec![v6]),
            ("off on one interface", vec![(v4, "1"), (v6, "1"), (lan, "0")], vec![lan]),
            ("no IPv6", vec![(v4, "1"), (lan, "1")], vec![]),
        ];
        let interface = Interface {
            index: 1,
            name: "lan0".into(),
            mac: [0; 6],
            mtu: 1500,
            up: true,
            is_ethernet: true,
            is_veth: false,
            master: None,
            lower: None,
        };
        for (case, values, expected) in cases {
            let root = settings(&values);

            let found = problems(root.path(), std::slice::from_ref(&interface));

            assert_eq!(found.len(), expected.len(), "{case}: {found:?}");
            for (problem, path) in found.iter().zip(expected) {
                assert!(problem.ends_with(&format!("sysctl -w {path}=1")), "{case}: {problem}");
            }
        }
    }

    #[test]
    fn given_replies_left_to_the_kernel_when_it_would_drop_them_then_the_setting_is_named() {
        let cases = [
            (["0", "0", "0", "0"], vec!["lan0/accept_local=1"]),
            (["0", "1", "0", "0"], vec![]),
            (["1", "0", "0", "0"], vec![]),
            (["0", "1", "1", "0"], vec!["lan0/rp_filter=2"]),
            (["0", "1", "1", "2"], vec![]),
            (["0", "0", "0", "1"], vec!["lan0/accept_local=1", "lan0/rp_filter=2"]),
        ];
        for ([all_local, lan_local, all_filter, lan_filter], expected) in cases {
            let root = settings(&[
                ("net/ipv4/conf/all/accept_local", all_local),
                ("net/ipv4/conf/lan0/accept_local", lan_local),
                ("net/ipv4/conf/all/rp_filter", all_filter),
                ("net/ipv4/conf/lan0/rp_filter", lan_filter),
            ]);
            let found = local_source_problem(root.path(), "lan0");
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (problem, setting) in found.iter().zip(expected) {
                assert!(problem.ends_with(setting), "{problem}");
            }
        }
    }
}
