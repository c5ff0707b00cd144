//! What differs between two configurations, in the words of the file.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Display,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use ipnet::IpNet;

use super::{
    Acl, Backend, Config, Gateway, Group, GroupKind, HealthCheck, HttpProbe, Instance, Limits,
    Listener, ProbeKind, UdpProbe,
};

/// Keys and values, in an order that depends on the kind of object only.
type Fields = Vec<(&'static str, String)>;
/// By name.
type Objects = BTreeMap<String, Fields>;

/// One line for each object that was added (`+`) or removed (`-`), and for each value that is another (`~`).
#[must_use]
pub fn changes(before: &Config, after: &Config) -> Vec<String> {
    let same: HashSet<&str> = before
        .instances
        .iter()
        .filter(|instance| after.instances.contains(instance))
        .map(|instance| instance.name.as_str())
        .collect();
    let (before, after) = (objects(before, &same), objects(after, &same));
    let gone = before.keys().filter(|name| !after.contains_key(*name));
    let mut changes: Vec<String> = gone.map(|name| format!("- {name}")).collect();
    for (name, fields) in &after {
        let Some(known) = before.get(name) else {
            changes.push(format!("+ {name}"));
            continue;
        };
        let others = known.iter().zip(fields).filter(|(was, is)| was != is);
        changes
            .extend(others.map(|((key, was), (_, is))| format!("~ {name}: {key} {was} -> {is}")));
    }
    changes
}

/// Those of a configuration, but for the instances in `same`: there may be thousands.
fn objects(config: &Config, same: &HashSet<&str>) -> Objects {
    let Gateway {
        interfaces,
        xdp_mode,
        region,
        flows,
        announce,
        no_listener,
        vlans,
        tunnel_source,
        seed,
        http,
        api,
        monitor,
        pins,
    } = &config.gateway;
    let gateway = vec![
        ("interfaces", list(interfaces)),
        ("xdp_mode", xdp_mode.to_string()),
        ("region", optional(region.as_ref())),
        ("flows", flows.to_string()),
        ("announce", announce.to_string()),
        ("no_listener", no_listener.to_string()),
        ("vlans", vlans.as_ref().map_or_else(|| "all".to_owned(), list)),
        ("tunnel_source", format!("{}, {}", tunnel_source.v4, tunnel_source.v6)),
        ("seed", optional(seed.as_ref())),
        ("http", optional(http.as_ref())),
        ("api", api.display().to_string()),
        ("monitor", optional(monitor.as_ref().map(|path| path.display()).as_ref())),
        ("pins", pins.display().to_string()),
    ];
    let mut objects = Objects::from([("gateway".to_owned(), gateway)]);
    let others = config.instances.iter().filter(|instance| !same.contains(instance.name.as_str()));
    for instance in others {
        let Instance { name, vips, groups, listeners } = &**instance;
        let instance = format!("instance {name}");
        for group in groups {
            add_group(&mut objects, &instance, group);
        }
        for listener in listeners {
            let name = format!("{instance}, listener {}/{}", listener.protocol, listener.port);
            objects.insert(name, of_listener(listener, groups));
        }
        objects.insert(instance, vec![("vips", list(vips))]);
    }
    objects
}

fn add_group(objects: &mut Objects, instance: &str, group: &Group) {
    let Group { name: _, kind, forwarding, sources, client_address, check_secondary, backends } =
        group;
    let name = format!("{instance}, group {}", group.label());
    let is_pair = *kind == GroupKind::PrimarySecondary;
    for (place, backend) in backends.iter().enumerate() {
        let Backend { name: backend, addresses, port, weight, drain, server_id, region } = backend;
        let role = match (is_pair, place) {
            (false, _) => "member",
            (true, 0) => "primary",
            (true, _) => "secondary",
        };
        let fields = vec![
            ("role", role.to_owned()),
            ("address", list(addresses)),
            ("port", optional(port.as_ref())),
            ("weight", weight.to_string()),
            ("drain", drain.to_string()),
            ("server_id", optional(server_id.as_ref())),
            ("region", optional(region.as_ref())),
        ];
        objects.insert(format!("{name}, backend {backend}"), fields);
    }
    let fields = vec![
        ("kind", if is_pair { "primary/secondary" } else { "members" }.to_owned()),
        ("forwarding", forwarding.to_string()),
        ("sources", list(sources)),
        ("client_address", client_address.to_string()),
        ("check_secondary", check_secondary.to_string()),
    ];
    objects.insert(name, fields);
}

fn of_listener(listener: &Listener, groups: &[Group]) -> Fields {
    let Listener {
        protocol: _,
        port: _,
        group,
        backend_port,
        scheduler,
        persistence,
        idle_timeout,
        drain,
        acl,
        limits: Limits { new_flows, new_flows_per_source, bandwidth },
        all_unhealthy,
        enabled,
        health_check,
    } = listener;
    vec![
        ("group", groups[*group].label().to_owned()),
        ("backend_port", optional(backend_port.as_ref())),
        ("scheduler", scheduler.to_string()),
        ("persistence", or_off(*persistence)),
        ("idle_timeout", duration(*idle_timeout)),
        ("drain", or_off(*drain)),
        ("acl", acl.as_ref().map_or_else(|| "none".to_owned(), of_acl)),
        ("new_flows", optional(new_flows.as_ref())),
        ("new_flows_per_source", optional(new_flows_per_source.as_ref())),
        ("bandwidth", optional(bandwidth.as_ref())),
        ("all_unhealthy", all_unhealthy.to_string()),
        ("enabled", enabled.to_string()),
        ("health_check", health_check.as_ref().map_or_else(|| "off".to_owned(), of_check)),
    ]
}

fn of_check(check: &HealthCheck) -> String {
    let HealthCheck {
        probe,
        port,
        interval,
        timeout,
        healthy,
        unhealthy,
        passive,
        proxy_header: _,
    } = check;
    let probe = match probe {
        ProbeKind::Tcp => "tcp".to_owned(),
        ProbeKind::Http(HttpProbe { method, path, host, expect }) => {
            let expect = expect.iter().map(|(from, to)| format!("{from}-{to}"));
            let expect: Vec<String> = expect.collect();
            format!("http {method} {path} of {}, expect {}", optional(host.as_ref()), list(&expect))
        }
        ProbeKind::Udp(UdpProbe { send, receive }) => {
            format!("udp send {send:?}, receive {receive:?}")
        }
    };
    format!(
        "{probe}, port {}, every {}, timeout {}, {healthy} up, {unhealthy} down{}",
        optional(port.as_ref()),
        duration(*interval),
        duration(*timeout),
        if *passive { ", passive" } else { "" },
    )
}

fn of_acl(acl: &Acl) -> String {
    /// Of longer lists only these many are told, and a number for the whole.
    const TOLD: usize = 4;
    let Acl { mode, sources } = acl;
    let told: Vec<&IpNet> = sources.iter().take(TOLD).collect();
    if sources.len() <= TOLD {
        return format!("{mode} {}", list(&told));
    }
    let mut hasher = DefaultHasher::new();
    sources.hash(&mut hasher);
    let (more, hash) = (sources.len() - TOLD, hasher.finish() as u32);
    format!("{mode} {} and {more} more ({hash:08x})", list(&told))
}

fn or_off(value: Option<Duration>) -> String {
    value.map_or_else(|| "off".to_owned(), duration)
}

fn list<'a, T: Display + 'a>(values: impl IntoIterator<Item = &'a T>) -> String {
    let values: Vec<String> = values.into_iter().map(ToString::to_string).collect();
    format!("[{}]", values.join(", "))
}

fn optional(value: Option<&impl ToString>) -> String {
    value.map_or_else(|| "none".to_owned(), ToString::to_string)
}

fn duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::parse;

    const BEFORE: &str = r#"
[gateway]
interfaces = ["wan0"]
[[instance]]
name = "shop"
vips = ["203.0.113.10"]
  [[instance.backend]]
  name = "web-1"
  address = "10.0.0.11"
  [[instance.backend]]
  name = "web-2"
  address = "10.0.0.12"
  [[instance.group]]
  name = "db"
  primary   = { name = "db-1", address = "10.0.0.31", port = 5432 }
  secondary = { name = "db-2", address = "10.0.0.32", port = 5432 }
  [[instance.listener]]
  protocol = "tcp"
  port = 80
  backend_port = 8080
  [[instance.listener]]
  protocol = "tcp"
  port = 5432
  group = "db"
"#;

    fn config(text: &str) -> Config {
        parse(Path::new("slb.toml"), text).unwrap().0
    }

    fn change(from: &str, to: &str) -> Vec<String> {
        assert!(BEFORE.contains(from), "{from}");
        changes(&config(BEFORE), &config(&BEFORE.replace(from, to)))
    }

    #[test]
    fn given_one_edit_when_compared_then_it_is_told_in_one_line() {
        let web_2 = "  [[instance.backend]]\n  name = \"web-2\"\n  address = \"10.0.0.12\"\n";
        let primary = "primary   = { name = \"db-1\", address = \"10.0.0.31\", port = 5432 }";
        let cases = [
            (
                "interfaces = [\"wan0\"]",
                "interfaces = [\"wan0\", \"lan0\"]",
                "~ gateway: interfaces [wan0] -> [wan0, lan0]",
            ),
            (
                "\"10.0.0.12\"",
                "\"10.0.0.12\"\n  weight = 7",
                "~ instance shop, group default, backend web-2: weight 100 -> 7",
            ),
            (web_2, "", "- instance shop, group default, backend web-2"),
            (
                "port = 80\n",
                "port = 80\n  scheduler = \"wrr\"\n",
                "~ instance shop, listener tcp/80: scheduler tch -> wrr",
            ),
            (
                "backend_port = 8080",
                "backend_port = 8081",
                "~ instance shop, listener tcp/80: backend_port 8080 -> 8081",
            ),
            (
                primary,
                "primary   = { name = \"db-1\", address = \"10.0.0.33\", port = 5432 }",
                "~ instance shop, group db, backend db-1: address [10.0.0.31] -> [10.0.0.33]",
            ),
            (
                "vips = [\"203.0.113.10\"]",
                "vips = [\"203.0.113.11\"]",
                "~ instance shop: vips [203.0.113.10] -> [203.0.113.11]",
            ),
        ];
        for (from, to, expected) in cases {
            assert_eq!(change(from, to), [expected], "{to}");
        }
    }

    #[test]
    fn given_an_edited_check_when_compared_then_both_are_told() {
        let change = change(
            "backend_port = 8080",
            "backend_port = 8080\n    [instance.listener.health_check]\n    unhealthy = 5",
        );
        let [change] = &change[..] else { panic!("{change:?}") };
        assert!(
            change.starts_with("~ instance shop, listener tcp/80: health_check tcp"),
            "{change}"
        );
        assert!(change.ends_with("3 up, 5 down"), "{change}");
    }

    #[test]
    fn given_other_objects_when_compared_then_each_is_told_once() {
        let more = "port = 5432\n  group = \"db\"\n[[instance]]\nname = \"blog\"\n\
            vips = [\"203.0.113.20\"]\n  [[instance.group]]\n  name = \"app\"\n    \
            [[instance.group.backend]]\n    name = \"app-1\"\n    address = \"10.0.0.41\"\n    \
            port = 80\n  [[instance.listener]]\n  protocol = \"udp\"\n  port = 53\n  group = \"app\"\n";
        let expected = [
            "+ instance blog",
            "+ instance blog, group app",
            "+ instance blog, group app, backend app-1",
            "+ instance blog, listener udp/53",
        ];
        assert_eq!(change("port = 5432\n  group = \"db\"\n", more), expected);
    }

    #[test]
    fn given_comments_and_another_order_when_compared_then_nothing_is_told() {
        let reordered = BEFORE.replace(
            "name = \"shop\"\nvips = [\"203.0.113.10\"]",
            "# ours\nvips = [\"203.0.113.10\"]\nname = \"shop\"",
        );
        assert_eq!(changes(&config(BEFORE), &config(&reordered)), [""; 0]);
    }
}
