//! Edits of a file, and of the configuration that was read from it.

use std::net::IpAddr;

use super::*;

const FILE: &str = r#"# Ours.
[gateway]
interfaces = ["wan0"]   # one is enough

[[instance]]
name = "shop"
vips = ["203.0.113.10"]

  # The old one.
  [[instance.backend]]
  name = "web-1"
  address = "10.0.0.11"
  weight = 40           # slow

  [[instance.backend]]
  address = "10.0.0.12"
  name = "web-2"

  [[instance.group]]
  name = "api"
    [[instance.group.backend]]
    name = "api-1"
    address = ["10.0.0.21", "2001:db8:10::21"]
    port = 9001

  [[instance.group]]
  name = "db"
  primary   = { name = "db-1", address = "10.0.0.31", port = 5432 }
  secondary = { name = "db-2", address = "10.0.0.32", port = 5432 }

  [[instance.listener]]
  protocol = "tcp"
  port = 80
  backend_port = 8080
  # Sometimes not.
  enabled = true

  [[instance.listener]]
  protocol = "udp"
  port = 53
  group = "api"

[[instance]]
name = "blog"
vips = ["203.0.113.20"]
backend = [{ name = "b-1", address = "10.0.0.41" }, { name = "b-2", address = "10.0.0.42" }]
listener = [{ protocol = "tcp", port = 80, backend_port = 8080 }]
"#;

fn place(instance: &str, group: Option<&str>, backend: &str) -> Place {
    let (instance, backend) = (instance.to_owned(), backend.to_owned());
    Place { instance, group: group.map(str::to_owned), backend }
}

/// In the part that it concerns and, so that both are the same, in the whole.
fn edit(text: &str, edit: &Edit) -> Result<String, EditError> {
    let found = apply(edit, text);
    let whole = apply(edit, &format!("{text}# No string of several lines: \"\"\"\n"));
    if let (Ok(found), Ok(whole)) = (&found, &whole) {
        // `toml_edit` drops the mark.
        assert!(
            whole.starts_with(found.trim_start_matches('\u{feff}')),
            "{found}\nis not\n{whole}"
        );
    }
    assert_eq!(found.is_ok(), whole.is_ok());
    found
}

#[test]
fn given_an_edit_when_applied_to_what_was_read_then_it_is_as_if_the_file_was_read_again() {
    use crate::config::parse;
    let path = std::path::Path::new("slb.toml");
    let drain = |place, drain| Edit::DrainBackend { place, drain };
    let before = parse(path, FILE).unwrap().0;
    let same = [
        weight(place("shop", None, "web-1"), 7),
        weight(place("shop", Some("api"), "api-1"), 100),
        weight(place("shop", None, "api-1"), 100),
        drain(place("shop", None, "web-2"), true),
        drain(place("shop", Some("db"), "db-1"), true),
        drain(place("shop", None, "db-2"), true),
        enable("shop", "tcp", 80, false),
    ];
    for change in same {
        let read = parse(path, &edit(FILE, &change).unwrap()).unwrap().0;
        assert_eq!(before.edited(&change).unwrap(), read, "{change:?}");
    }
    let others = [
        weight(place("shop", None, "web-1"), 101),
        weight(place("shop", None, "web-9"), 7),
        weight(place("shop", Some("db"), "db-1"), 7),
        // Which is worth a warning.
        weight(place("shop", Some("api"), "api-1"), 0),
        drain(place("shop", Some("api"), "api-1"), true),
        enable("shop", "tcp", 81, false),
        Edit::RemoveBackend { place: place("shop", None, "web-1") },
    ];
    for change in others {
        assert_eq!(before.edited(&change), None, "{change:?}");
    }
}

fn weight(place: Place, weight: u32) -> Edit {
    Edit::SetWeight { place, weight }
}

fn enable(instance: &str, protocol: &str, port: u16, enabled: bool) -> Edit {
    let (instance, protocol) = (instance.to_owned(), protocol.parse().unwrap());
    Edit::EnableListener { instance, protocol, port, enabled }
}

#[test]
fn given_a_file_when_edited_then_only_what_was_asked_for_is_different() {
    let v4: IpAddr = "10.0.0.99".parse().unwrap();
    let v6: IpAddr = "2001:db8:10::99".parse().unwrap();
    let add = |place, addresses: &[IpAddr], port, weight| Edit::AddBackend {
        place,
        addresses: addresses.into(),
        port,
        weight,
    };
    let cases = [
        (
            weight(place("shop", None, "web-1"), 7),
            "weight = 40           #",
            "weight = 7           #",
        ),
        (
            weight(place("shop", None, "web-2"), 0),
            "  name = \"web-2\"\n",
            "  name = \"web-2\"\n  weight = 0\n",
        ),
        (
            weight(place("shop", Some("api"), "api-1"), 3),
            "    port = 9001\n",
            "    port = 9001\n    weight = 3\n",
        ),
        (
            weight(place("blog", None, "b-2"), 3),
            "address = \"10.0.0.42\" }",
            "address = \"10.0.0.42\" , weight = 3 }",
        ),
        (
            Edit::DrainBackend { place: place("shop", None, "web-2"), drain: true },
            "  name = \"web-2\"\n",
            "  name = \"web-2\"\n  drain = true\n",
        ),
        (
            weight(place("shop", None, "api-1"), 3),
            "    port = 9001\n",
            "    port = 9001\n    weight = 3\n",
        ),
        (
            Edit::DrainBackend { place: place("shop", None, "db-1"), drain: true },
            "address = \"10.0.0.31\", port = 5432 }",
            "address = \"10.0.0.31\", port = 5432 , drain = true }",
        ),
        (
            Edit::RemoveBackend { place: place("shop", None, "api-1") },
            "    [[instance.group.backend]]\n    name = \"api-1\"\n    address = [\"10.0.0.21\", \
             \"2001:db8:10::21\"]\n    port = 9001\n",
            "",
        ),
        (
            add(place("shop", None, "web-3"), &[v4], None, Some(50)),
            "  name = \"web-2\"\n",
            "  name = \"web-2\"\n\n  [[instance.backend]]\n  name = \"web-3\"\n  address = \
             \"10.0.0.99\"\n  weight = 50\n",
        ),
        (
            add(place("shop", Some("api"), "api-2"), &[v4, v6], Some(9_002), None),
            "    port = 9001\n",
            "    port = 9001\n\n    [[instance.group.backend]]\n    name = \"api-2\"\n    address = \
             [\"10.0.0.99\", \"2001:db8:10::99\"]\n    port = 9002\n",
        ),
        (
            add(place("blog", None, "b-3"), &[v4], None, None),
            "\"10.0.0.42\" }]",
            "\"10.0.0.42\" }, { name = \"b-3\", address = \"10.0.0.99\" }]",
        ),
        (
            Edit::RemoveBackend { place: place("shop", None, "web-2") },
            "  [[instance.backend]]\n  address = \"10.0.0.12\"\n  name = \"web-2\"\n\n",
            "",
        ),
        (
            Edit::RemoveBackend { place: place("blog", None, "b-1") },
            "{ name = \"b-1\", address = \"10.0.0.41\" }, ",
            " ",
        ),
        (enable("shop", "tcp", 80, false), "enabled = true", "enabled = false"),
        (
            enable("shop", "udp", 53, false),
            "  group = \"api\"\n",
            "  group = \"api\"\n  enabled = false\n",
        ),
        (enable("shop", "tcp", 80, true), "enabled = true", "enabled = true"),
        (enable("shop", "udp", 53, true), "port = 53", "port = 53"),
    ];
    for (change, from, to) in cases {
        assert_eq!(FILE.matches(from).count(), 1, "{from}");
        let found = edit(FILE, &change).unwrap();
        assert_eq!(found, FILE.replace(from, to), "{change:?}");
    }
}

#[test]
fn given_what_is_not_there_when_edited_then_the_error_says_what_is() {
    let cases = [
        (
            weight(place("shp", None, "web-1"), 1),
            "no instance 'shp' in the file; there is shop, blog",
        ),
        (
            weight(place("shop", Some("apo"), "a"), 1),
            "no group 'apo' in the file; there is api, db",
        ),
        (
            weight(place("shop", None, "web-9"), 1),
            "no backend 'web-9' in the file; there is web-1, web-2",
        ),
        (
            Edit::RemoveBackend { place: place("shop", Some("api"), "x") },
            "no backend 'x' in the file; there is api-1",
        ),
        (
            weight(place("shop", Some("db"), "db-1"), 1),
            "which have no weights; `slb backend drain`",
        ),
        (weight(place("shop", None, "db-2"), 1), "group \"db\" has a primary and a secondary"),
        (
            Edit::RemoveBackend { place: place("shop", None, "db-2") },
            "and no others; write another backend in place",
        ),
        (
            enable("shop", "tcp", 53, true),
            "no listener 'tcp/53' in the file; there is tcp/80, udp/53",
        ),
    ];
    for (change, expected) in cases {
        let error = edit(FILE, &change).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = edit("[[nonsense", &enable("shop", "tcp", 80, true)).unwrap_err().to_string();
    assert!(error.contains("not valid TOML"), "{error}");
}

#[test]
fn given_a_name_in_two_groups_when_edited_then_the_error_names_both_and_the_default_group_is_first()
{
    let twice = FILE.replace("\"db-1\"", "\"api-1\"");
    let error = edit(&twice, &weight(place("shop", None, "api-1"), 1)).unwrap_err().to_string();
    assert_eq!(error, "backend 'api-1' is in groups api and db; name one of them with --group");
    let thrice = twice.replace("\"web-2\"", "\"api-1\"");
    let found = edit(&thrice, &weight(place("shop", None, "api-1"), 1)).unwrap();
    let line = "  name = \"api-1\"\n\n  [[instance.group]]";
    assert!(thrice.contains(line));
    let weighted = "  name = \"api-1\"\n  weight = 1\n\n  [[instance.group]]";
    assert_eq!(found, thrice.replace(line, weighted));
}

#[test]
fn given_a_string_that_looks_like_an_instance_when_edited_then_it_stays() {
    let text = format!("note = \"\"\"\n{FILE}\"\"\"\n{FILE}");
    let found = edit(&text, &weight(place("shop", None, "web-1"), 7)).unwrap();
    let edited = edit(FILE, &weight(place("shop", None, "web-1"), 7)).unwrap();
    assert_eq!(found, format!("note = \"\"\"\n{FILE}\"\"\"\n{edited}"));
}

#[test]
fn given_headers_of_any_form_when_edited_then_the_right_instance_is() {
    let (gateway, instances) = FILE.split_at(FILE.find("[[instance]]").unwrap());
    let cases = [
        format!("{instances}\n{gateway}"),
        format!("\u{feff}{FILE}"),
        FILE.replace("[[instance]]", "[[ instance ]]"),
        FILE.replacen("[[instance]]", "# [[instance]] name = \"blog\"\n[[instance]]", 1),
    ];
    for text in cases {
        let found = edit(&text, &weight(place("shop", None, "web-1"), 7)).unwrap();
        assert_eq!(found, text.replace("weight = 40 ", "weight = 7 "));
    }
    // A backend of the one has the name of the other.
    let text = FILE.replace("\"web-2\"", "\"blog\"");
    let found = edit(&text, &weight(place("blog", None, "b-2"), 3)).unwrap();
    assert_eq!(found, text.replace("10.0.0.42\" }", "10.0.0.42\" , weight = 3 }"));
    let crlf = FILE.replace('\n', "\r\n");
    let found = edit(&crlf, &enable("shop", "tcp", 80, false)).unwrap();
    assert_eq!(found, crlf.replace("enabled = true", "enabled = false"));
    let found = edit(&crlf, &weight(place("shop", None, "web-2"), 0)).unwrap();
    let line = "  name = \"web-2\"\r\n";
    assert_eq!(found, crlf.replace(line, &format!("{line}  weight = 0\r\n")));
}

#[test]
fn given_a_group_without_backends_when_one_is_added_then_it_stands_in_its_instance() {
    let before = FILE.find("  [[instance.group]]").unwrap();
    let start = FILE.find("  # The old one.").unwrap();
    let text = format!("{}{}", &FILE[..start], &FILE[before..]);
    let change = Edit::AddBackend {
        place: place("shop", None, "web-1"),
        addresses: vec!["10.0.0.11".parse().unwrap()],
        port: None,
        weight: None,
    };
    let found = edit(&text, &change).unwrap();
    let (added, blog) = (found.find("web-1").unwrap(), found.find("name = \"blog\"").unwrap());
    assert!(added < blog, "{found}");
    let (config, _) = crate::config::parse(std::path::Path::new("f"), &found).unwrap();
    let default = config.instances[0].groups.iter().find(|group| group.name.is_none()).unwrap();
    assert_eq!(default.backends.len(), 1);
}
