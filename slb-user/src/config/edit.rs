//! Edits of the file by command: its comments and its order stay.

use std::{net::IpAddr, ops::Range};

use slb_api::{Edit, Place};
use toml_edit::{
    ArrayOfTables, Decor, DocumentMut, InlineTable, Item, Table, TableLike, Value, value,
};

use super::{Backend, Config, Group, GroupKind, Listener, MAX_WEIGHT};

/// What cannot be done to a file, and what could.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// The file cannot be read as TOML.
    #[error("the file is not valid TOML: {0}")]
    Toml(toml_edit::TomlError),
    /// The file has no object of that name.
    #[error("there is no {kind} '{wanted}' in the file; {}", existing(.known))]
    NotFound {
        /// `instance`, `group`, `listener` or `backend`.
        kind: &'static str,
        /// Its name in the command.
        wanted: String,
        /// The names that the file has.
        known: Vec<String>,
    },
    /// The group's backends are named by their place in the file.
    #[error(
        "group {group:?} has a primary and a secondary, which the file names; edit it, and `slb reload`"
    )]
    PrimarySecondary {
        /// Its name.
        group: String,
    },
    /// The file has something else in place of the backends.
    #[error("'backend' is no array of tables")]
    NoArray,
}

fn existing(known: &[String]) -> String {
    match known {
        [] => "there is none".to_owned(),
        known => format!("there is {}", known.join(", ")),
    }
}

/// A file's text after the edit. Whether that is valid is for [`super::parse`] to say.
///
/// # Errors
///
/// There is nothing to be edited, or the text is no TOML.
pub fn apply(edit: &Edit, text: &str) -> Result<String, EditError> {
    // To read a whole file with thousands of backends takes a tenth of a second.
    for part in parts(text, edit.instance()) {
        let Ok(mut file) = text[part.clone()].parse() else { continue };
        if instance(&mut file, edit.instance()).is_ok() {
            change(&mut file, edit)?;
            return Ok([&text[..part.start], &file.to_string(), &text[part.end..]].concat());
        }
    }
    let mut file = text.parse::<DocumentMut>().map_err(EditError::Toml)?;
    change(&mut file, edit)?;
    Ok(file.to_string())
}

/// Where in a file an instance may stand that is named like that: from its header to that of the next one. None, if
/// what looks like a header may be within a string of several lines, or lines end in CR: `toml_edit` writes LF, and is
/// to do so in the whole file.
fn parts(text: &str, name: &str) -> Vec<Range<usize>> {
    if ["\"\"\"", "'''", "\r"].iter().any(|mark| text.contains(mark)) {
        return Vec::new();
    }
    let headers = text.match_indices("[[instance]]");
    let starts = headers.map(|(at, _)| text[..at].rfind('\n').map_or(0, |end| end + 1)..at);
    let mut starts: Vec<usize> = starts
        .filter(|indent| text[indent.clone()].chars().all(char::is_whitespace))
        .map(|indent| indent.start)
        .collect();
    starts.push(text.len());
    let names = [format!("\"{name}\""), format!("'{name}'")];
    let parts = starts.windows(2).map(|bounds| bounds[0]..bounds[1]);
    parts.filter(|part| names.iter().any(|name| text[part.clone()].contains(name))).collect()
}

impl Config {
    /// What the configuration is after an edit that needs no look at the rest of the file. `None`: one that does,
    /// or that is wrong.
    #[must_use]
    pub fn edited(&self, edit: &Edit) -> Option<Self> {
        let mut config = self.clone();
        match edit {
            Edit::SetWeight { place, weight } => {
                let weight = u8::try_from(*weight).ok().filter(|weight| *weight <= MAX_WEIGHT)?;
                config.change(place, |backend| backend.weight = weight)?;
            }
            Edit::DrainBackend { place, drain } => {
                config.change(place, |backend| backend.drain = *drain)?;
            }
            Edit::EnableListener { instance, protocol, port, enabled } => {
                let mut instances = config.instances.iter_mut();
                let instance = instances.find(|known| known.name == *instance)?;
                let mut listeners = instance.listeners.iter_mut();
                let is_it = |it: &&mut Listener| it.protocol == *protocol && it.port == *port;
                listeners.find(is_it)?.enabled = *enabled;
            }
            Edit::AddBackend { .. } | Edit::RemoveBackend { .. } => return None,
        }
        Some(config)
    }

    /// Changes a backend, unless that leaves nobody in its group who gets new flows, or did so before: the
    /// warnings are others then.
    fn change(&mut self, place: &Place, change: impl FnOnce(&mut Backend)) -> Option<()> {
        let mut instances = self.instances.iter_mut();
        let instance = instances.find(|instance| instance.name == place.instance)?;
        let mut groups = instance.groups.iter_mut();
        let group = groups
            .find(|group| group.name == place.group && group.kind != GroupKind::PrimarySecondary)?;
        let serves = |group: &Group| group.backends.iter().any(|it| it.weight > 0 && !it.drain);
        let served = serves(group);
        change(group.backends.iter_mut().find(|backend| backend.name == place.backend)?);
        (served && serves(group)).then_some(())
    }
}

fn change(file: &mut DocumentMut, edit: &Edit) -> Result<(), EditError> {
    match edit {
        Edit::AddBackend { place, addresses, port, weight } => {
            add(file, place, &record(&place.backend, addresses, *port, *weight))?;
        }
        Edit::RemoveBackend { place } => remove(file, place)?,
        Edit::SetWeight { place, weight } => {
            let found = backends(file, place)?.ok_or_else(|| no_backend(place, Vec::new()))?;
            set(find_backend(tables(found), place)?, "weight", i64::from(*weight));
        }
        Edit::DrainBackend { place, drain } => {
            let found = backends(file, place)?.ok_or_else(|| no_backend(place, Vec::new()))?;
            let found = find_backend(tables(found), place)?;
            // What it is without.
            if *drain || found.contains_key("drain") {
                set(found, "drain", *drain);
            }
        }
        Edit::EnableListener { instance, protocol, port, enabled } => {
            let instance = self::instance(file, instance)?;
            let listeners = instance.get_mut("listener").map(tables).unwrap_or_default();
            let label = |table: &dyn TableLike| {
                let protocol = table.get("protocol")?.as_str()?.to_owned();
                Some(format!("{protocol}/{}", table.get("port")?.as_integer()?))
            };
            let found = find(listeners, "listener", &format!("{protocol}/{port}"), label)?;
            // What it is without.
            if !enabled || found.contains_key("enabled") {
                set(found, "enabled", *enabled);
            }
        }
    }
    Ok(())
}

/// A backend as it stands in a file.
fn record(name: &str, addresses: &[IpAddr], port: Option<u16>, weight: Option<u32>) -> InlineTable {
    let mut table = InlineTable::new();
    table.insert("name", name.into());
    let address = match addresses {
        [address] => address.to_string().into(),
        addresses => addresses.iter().map(ToString::to_string).collect::<Value>(),
    };
    table.insert("address", address);
    if let Some(port) = port {
        table.insert("port", i64::from(port).into());
    }
    if let Some(weight) = weight {
        table.insert("weight", i64::from(weight).into());
    }
    table
}

fn add(file: &mut DocumentMut, place: &Place, record: &InlineTable) -> Result<(), EditError> {
    if let Some(found) = backends(file, place)? {
        return match found {
            Item::ArrayOfTables(tables) => {
                push(tables, record);
                Ok(())
            }
            Item::Value(Value::Array(array)) => {
                array.push(record.clone());
                Ok(())
            }
            _ => Err(EditError::NoArray),
        };
    }
    let mut tables = ArrayOfTables::new();
    push(&mut tables, record);
    parent(file, place)?.insert("backend", Item::ArrayOfTables(tables));
    Ok(())
}

/// Appends a table that looks like the last one.
fn push(tables: &mut ArrayOfTables, record: &InlineTable) {
    let last = tables.iter().last();
    let header = last.map(|table| indent(table.decor()));
    let key = last.and_then(|table| table.iter().next().map(|(key, _)| key.to_owned()));
    let key = key.and_then(|key| Some(indent(last?.key(&key)?.leaf_decor())));
    let mut table = Table::new();
    for (name, value) in record {
        table.insert(name, Item::Value(value.clone()));
        if let (Some(indent), Some(mut key)) = (&key, table.key_mut(name)) {
            key.leaf_decor_mut().set_prefix(indent.clone());
        }
    }
    if let Some(indent) = header {
        table.decor_mut().set_prefix(format!("\n{indent}"));
    }
    tables.push(table);
}

/// The blanks before something, without the lines above it.
fn indent(decor: &Decor) -> String {
    let prefix = decor.prefix().and_then(|prefix| prefix.as_str()).unwrap_or_default();
    let line = prefix.rsplit('\n').next().unwrap_or_default();
    line.chars().take_while(|char| char.is_whitespace()).collect()
}

fn remove(file: &mut DocumentMut, place: &Place) -> Result<(), EditError> {
    let found = backends(file, place)?.ok_or_else(|| no_backend(place, Vec::new()))?;
    let all = tables(found);
    let names: Vec<Option<String>> = all.iter().map(|table| name(&**table)).collect();
    let is_it = |name: &Option<String>| name.as_ref() == Some(&place.backend);
    let index = names.iter().position(is_it).ok_or_else(|| {
        let names: Vec<String> = names.iter().flatten().cloned().collect();
        no_backend(place, names)
    })?;
    match found {
        Item::ArrayOfTables(tables) => {
            tables.remove(index);
        }
        Item::Value(Value::Array(array)) => {
            array.remove(index);
        }
        _ => {}
    }
    Ok(())
}

/// Writes a value, with what surrounds it as it was.
fn set(table: &mut dyn TableLike, key: &str, new: impl Into<Value>) {
    let new = new.into();
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            let decor = old.decor().clone();
            *old = new;
            *old.decor_mut() = decor;
        }
        None => {
            // Aligned with the key before.
            let before = table.iter().last().map(|(key, _)| key.to_owned());
            let prefix = before.and_then(|key| Some(indent(table.key(&key)?.leaf_decor())));
            table.insert(key, value(new));
            if let (Some(prefix), Some(mut key)) = (prefix, table.key_mut(key)) {
                key.leaf_decor_mut().set_prefix(prefix);
            }
        }
    }
}

fn instance<'a>(
    file: &'a mut DocumentMut,
    wanted: &str,
) -> Result<&'a mut dyn TableLike, EditError> {
    let all = file.get_mut("instance").map(tables).unwrap_or_default();
    find(all, "instance", wanted, name)
}

/// The table that has the backends of a place: an instance, or a group of it.
fn parent<'a>(
    file: &'a mut DocumentMut,
    place: &Place,
) -> Result<&'a mut dyn TableLike, EditError> {
    let instance = instance(file, &place.instance)?;
    let Some(wanted) = &place.group else { return Ok(instance) };
    let groups = instance.get_mut("group").map(tables).unwrap_or_default();
    let group = find(groups, "group", wanted, name)?;
    if group.contains_key("primary") || group.contains_key("secondary") {
        return Err(EditError::PrimarySecondary { group: wanted.clone() });
    }
    Ok(group)
}

fn backends<'a>(
    file: &'a mut DocumentMut,
    place: &Place,
) -> Result<Option<&'a mut Item>, EditError> {
    Ok(parent(file, place)?.get_mut("backend"))
}

fn find_backend<'a>(
    all: Vec<&'a mut dyn TableLike>,
    place: &Place,
) -> Result<&'a mut dyn TableLike, EditError> {
    find(all, "backend", &place.backend, name)
}

/// The tables of an array, however it is written.
fn tables(item: &mut Item) -> Vec<&mut dyn TableLike> {
    match item {
        Item::ArrayOfTables(tables) => {
            tables.iter_mut().map(|table| table as &mut dyn TableLike).collect()
        }
        Item::Value(Value::Array(array)) => {
            let inline = array.iter_mut().filter_map(Value::as_inline_table_mut);
            inline.map(|table| table as &mut dyn TableLike).collect()
        }
        _ => Vec::new(),
    }
}

fn name(table: &dyn TableLike) -> Option<String> {
    table.get("name")?.as_str().map(str::to_owned)
}

/// The one of `all` that `label` calls `wanted`.
fn find<'a>(
    all: Vec<&'a mut dyn TableLike>,
    kind: &'static str,
    wanted: &str,
    label: impl Fn(&dyn TableLike) -> Option<String>,
) -> Result<&'a mut dyn TableLike, EditError> {
    let names: Vec<String> = all.iter().filter_map(|table| label(&**table)).collect();
    let found = all.into_iter().find(|table| label(&**table).as_deref() == Some(wanted));
    found.ok_or_else(|| unknown(kind, wanted, names))
}

fn no_backend(place: &Place, names: Vec<String>) -> EditError {
    unknown("backend", &place.backend, names)
}

fn unknown(kind: &'static str, wanted: &str, known: Vec<String>) -> EditError {
    EditError::NotFound { kind, wanted: wanted.to_owned(), known }
}

#[cfg(test)]
mod tests {
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
            drain(place("shop", None, "web-2"), true),
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
                "group \"db\" has a primary and a secondary",
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
        let found = edit(&FILE.replace('\n', "\r\n"), &enable("shop", "tcp", 80, false)).unwrap();
        assert_eq!(found, FILE.replace("enabled = true", "enabled = false"));
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
}
