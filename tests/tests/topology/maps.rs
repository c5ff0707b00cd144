//! The maps as others see them.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::Value;
use slb_common::abi::{Address, Endpoint, TCP};

use crate::support::{
    Lab,
    maps::{chosen, names, version},
    output,
    plan::{self, PRIMARY, SECONDARY, vips},
};

/// Those that hold what bpftool has no fields for, or nothing without fragments, lists, QUIC, persistence and virtual MAC
/// addresses.
const OTHERS: [&str; 7] = [
    "SLB_FRAGMENTS",
    "SLB_PROGRAMS",
    "SLB_ACL",
    "SLB_QUIC",
    "SLB_STICKY",
    "SLB_MACS",
    "SLB_SUBNETS",
];

/// What `bpftool` shows of an element's key and value: no names where it is a plain number.
const FIELDS: [(&str, &[&str], &[&str]); 26] = [
    (
        "SLB_LISTENERS",
        &["addr", "port", "proto"],
        &[
            "id",
            "scheduler",
            "previous_scheduler",
            "first_chunk",
            "slots",
            "previous_chunk",
            "previous_slots",
            "flags",
            "acl",
            "sticky_jiffies",
            "spare",
            "seed",
            "previous_seed",
        ],
    ),
    ("SLB_LISTENER_INDEX", &[], &["places", "records"]),
    ("SLB_REVNAT_INDEX", &[], &["places", "records"]),
    ("SLB_SLOTS", &[], &["slots"]),
    ("SLB_RR_CURSORS", &[], &[]),
    (
        "SLB_BACKENDS",
        &[],
        &[
            "addr",
            "hop",
            "port",
            "flags",
            "idle_jiffies",
            "listener",
            "mode",
            "mtu",
            "source",
            "sources",
            "weight",
            "closes",
        ],
    ),
    ("SLB_FILTER", &[], &["bypass_until", "adopted_until", "roles", "elsewhere"]),
    ("SLB_ADDRESSES", &["bytes"], &["__0"]),
    (
        "SLB_REVNAT",
        &["addr", "port", "proto"],
        &["vip", "port", "backend", "flags", "ingress", "interfaces"],
    ),
    ("SLB_INTERFACES", &[], &["ifindex", "number", "redirect", "mac", "spare"]),
    ("SLB_INGRESS", &[], &["ifindex", "number", "redirect", "mac", "spare"]),
    ("SLB_VLANS", &[], &[]),
    (
        "SLB_SETTINGS",
        &[],
        &[
            "route_epoch",
            "buckets",
            "opening_jiffies",
            "closing_jiffies",
            "fragment_jiffies",
            "no_listener",
            "generic",
            "veth",
            "acl_epoch",
            "spare",
            "tunnel_v4",
            "tunnel_v6",
            "seed",
            "table_seed",
        ],
    ),
    ("SLB_SOURCES", &[], &["bytes"]),
    ("SLB_NEXT_HOPS", &[], &["addr", "vip", "hop", "epoch", "flags", "mtu", "spare"]),
    ("SLB_FLOWS", &[], &["flows"]),
    ("SLB_BYPASS", &[], &[]),
    (
        "SLB_SCRATCH",
        &[],
        &["packet", "keys", "args", "words", "spare", "head", "errors_at", "errors", "options"],
    ),
    ("SLB_ACTIVE", &[], &[]),
    ("SLB_PASSIVE_HC", &[], &["accepted", "refused"]),
    ("SLB_ACL_CACHE", &[], &["addr", "acl", "epoch", "is_listed", "write"]),
    (
        "SLB_LIMITS",
        &[],
        &["flow_ns", "flow_burst", "source_ns", "source_burst", "byte_ns", "byte_burst"],
    ),
    ("SLB_SRC_POLICER", &[], &["paid"]),
    ("SLB_POLICERS", &[], &["flows", "forward", "reply", "spare"]),
    ("SLB_VERDICTS", &[], &["packets", "bytes"]),
    ("SLB_TRAFFIC", &[], &["flows", "packets", "bytes", "reply_packets", "reply_bytes"]),
];

#[test]
#[ignore = "needs root"]
fn given_traffic_when_bpftool_dumps_the_pinned_maps_then_every_element_has_named_fields() {
    let mut lab = Lab::prepare();
    lab.edit("flows      = 262144", "flows      = 1024");
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    for to in vips(plan::WEB_PORT) {
        assert_eq!(lab.client.http(to, 20, 4).unwrap().ok(), 20);
    }

    let directory = version(&lab.gateway).join("maps");
    let names_of = FIELDS.iter().map(|(name, ..)| *name);
    let mut known: Vec<_> = names_of.chain(OTHERS).map(str::to_owned).collect();
    known.sort();
    assert_eq!(names(&directory), known);
    for (name, key_fields, value_fields) in FIELDS {
        let path = directory.join(name);
        let path = path.to_str().unwrap();
        let dump = output(&lab.topology.gateway, "bpftool", &["-j", "map", "dump", "pinned", path]);
        let dump: Vec<Value> = serde_json::from_str(&dump).unwrap();
        assert!(!dump.is_empty(), "{name} is empty");
        // The large ones have a hundred thousand alike.
        for element in dump.iter().take(2_000) {
            let formatted = &element["formatted"];
            assert!(formatted.is_object(), "{name}: {element}");
            assert_eq!(fields(&formatted["key"]), sorted(key_fields), "{name}: {formatted}");
            let values: Vec<&Value> = match formatted["values"].as_array() {
                Some(per_cpu) => per_cpu.iter().map(|cpu| &cpu["value"]).collect(),
                None => vec![&formatted["value"]],
            };
            for value in values {
                assert!(!value.is_null(), "{name}: {formatted}");
                assert_eq!(fields(value), sorted(value_fields), "{name}: {value}");
            }
        }
    }
}

/// The names of a JSON object's fields; none if it is no object.
fn fields(value: &Value) -> Vec<&str> {
    let mut names: Vec<_> =
        value.as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names
}

fn sorted<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let mut names = names.to_vec();
    names.sort_unstable();
    names
}

#[test]
#[ignore = "needs root"]
fn given_a_thousand_backends_when_the_primary_fails_then_the_maps_lead_to_the_secondary() {
    let mut lab = Lab::prepare();
    let mut instances = plan::instances(&lab.topology, plan::HEALTHY);
    instances += "[[instance.group]]\nname = \"many\"\n";
    for index in 0..1_000 {
        instances += &format!(
            "[[instance.group.backend]]\nname = \"many-{index}\"\naddress = \
             [\"10.1.{}.{}\", \"2001:db8:10:1::{index:x}\"]\nport = 9000\n",
            index / 250,
            index % 250 + 1
        );
    }
    instances += "[[instance.listener]]\nprotocol = \"tcp\"\nport = 9000\ngroup = \
                  \"many\"\nhealth_check.enabled = false\n";
    lab.gateway.configure(&instances).unwrap();
    lab.gateway.start().unwrap();
    lab.wait_all_healthy();
    let leads_to = |lab: &Lab| -> BTreeMap<IpAddr, Vec<IpAddr>> {
        let listeners = vips(plan::DB_PORT).map(|vip| {
            let addr = Address::from(vip.ip());
            let endpoint = Endpoint { addr, port: vip.port().into(), proto: TCP };
            let backends = chosen(&lab.gateway, endpoint);
            (vip.ip(), backends.into_iter().map(|backend| backend.addr.into()).collect())
        });
        listeners.into()
    };
    let expected = |lab: &Lab, name: &str| -> BTreeMap<IpAddr, Vec<IpAddr>> {
        let addresses = lab.host(name).addresses();
        vips(0).into_iter().zip(addresses).map(|(vip, own)| (vip.ip(), vec![own])).collect()
    };
    assert_eq!(leads_to(&lab), expected(&lab, PRIMARY));

    lab.server(PRIMARY, plan::DB).stop();
    lab.wait_health("tcp", plan::DB_PORT, PRIMARY, "unhealthy");

    assert_eq!(leads_to(&lab), expected(&lab, SECONDARY));
    for to in vips(plan::DB_PORT) {
        let outcome = lab.client.http(to, 20, 4).unwrap();
        assert_eq!(outcome.per_backend, [(SECONDARY.to_owned(), 20)].into(), "{to}: {outcome}");
    }
}
