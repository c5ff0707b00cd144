//! An edit of the file's text, whose comments and order stay.

use std::net::IpAddr;

use toml_edit::{
    ArrayOfTables, Decor, DocumentMut, InlineTable, Item, Table, TableLike, Value, value,
};

use super::{Edit, EditError, Place};

/// What a group with a primary and a secondary has in place of `backend`.
const PAIR: [&str; 2] = ["primary", "secondary"];

/// Carries out an edit.
///
/// # Errors
///
/// The file has no object of that name.
pub(super) fn change(file: &mut DocumentMut, edit: &Edit) -> Result<(), EditError> {
    match edit {
        Edit::AddBackend { place, addresses, port, weight } => {
            add(file, place, &record(&place.backend, addresses, *port, *weight))?;
        }
        Edit::RemoveBackend { place } => remove(file, place)?,
        Edit::SetWeight { place, weight } => {
            let group = group_of(file, place)?;
            if is_pair(&*parent(file, place, group.as_deref())?) {
                return Err(EditError::PairWithoutWeights { group: group.unwrap_or_default() });
            }
            set(backend(file, place, group.as_deref())?, "weight", i64::from(*weight));
        }
        Edit::DrainBackend { place, drain } => {
            let group = group_of(file, place)?;
            let found = backend(file, place, group.as_deref())?;
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
    let parent = parent(file, place, place.group.as_deref())?;
    if is_pair(&*parent) {
        return Err(EditError::Pair { group: place.group.clone().unwrap_or_default() });
    }
    if let Some(found) = parent.get_mut("backend") {
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
    parent.insert("backend", Item::ArrayOfTables(tables));
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
    let group = group_of(file, place)?;
    let parent = parent(file, place, group.as_deref())?;
    if is_pair(&*parent) {
        return Err(EditError::Pair { group: group.unwrap_or_default() });
    }
    let names: Vec<String> =
        backends_of(&mut *parent).iter().filter_map(|it| name(&**it)).collect();
    let unknown = || no_backend(place, names.clone());
    let found = parent.get_mut("backend").ok_or_else(unknown)?;
    let index = tables(found).iter().position(|it| name(&**it).as_ref() == Some(&place.backend));
    let index = index.ok_or_else(unknown)?;
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

/// The instance of a name.
pub(super) fn instance<'a>(
    file: &'a mut DocumentMut,
    wanted: &str,
) -> Result<&'a mut dyn TableLike, EditError> {
    let all = file.get_mut("instance").map(tables).unwrap_or_default();
    find(all, "instance", wanted, name)
}

/// The group that has the backend of a place: the one that the place names, or else the default group, or else the only
/// one with a backend of that name. `None`: the default group.
fn group_of(file: &mut DocumentMut, place: &Place) -> Result<Option<String>, EditError> {
    if place.group.is_some() {
        return Ok(place.group.clone());
    }
    let has = |table: &mut dyn TableLike| {
        backends_of(table).iter().any(|it| name(&**it).as_ref() == Some(&place.backend))
    };
    let instance = instance(file, &place.instance)?;
    if has(&mut *instance) {
        return Ok(None);
    }
    let groups = instance.get_mut("group").map(tables).unwrap_or_default().into_iter();
    let mut groups: Vec<String> =
        groups.filter_map(|it| has(&mut *it).then(|| name(&*it))?).collect();
    match groups.len() {
        0 | 1 => Ok(groups.pop()),
        _ => Err(EditError::Ambiguous { wanted: place.backend.clone(), groups }),
    }
}

/// The table that has the backends of a group of a place's instance, or of its default group.
fn parent<'a>(
    file: &'a mut DocumentMut,
    place: &Place,
    group: Option<&str>,
) -> Result<&'a mut dyn TableLike, EditError> {
    let instance = instance(file, &place.instance)?;
    let Some(wanted) = group else { return Ok(instance) };
    let groups = instance.get_mut("group").map(tables).unwrap_or_default();
    find(groups, "group", wanted, name)
}

/// Whether a group has a primary and a secondary.
fn is_pair(group: &dyn TableLike) -> bool {
    PAIR.iter().any(|key| group.contains_key(key))
}

/// The backends that stand in a table, of any kind of group.
fn backends_of(group: &mut dyn TableLike) -> Vec<&mut dyn TableLike> {
    let mut found = Vec::new();
    for (key, item) in group.iter_mut() {
        match item {
            item if key == "backend" => found.extend(tables(item)),
            item if PAIR.contains(&key.get()) => found.extend(item.as_table_like_mut()),
            _ => {}
        }
    }
    found
}

/// The table of a backend in a group of its instance, or in the default group.
fn backend<'a>(
    file: &'a mut DocumentMut,
    place: &Place,
    group: Option<&str>,
) -> Result<&'a mut dyn TableLike, EditError> {
    find(backends_of(parent(file, place, group)?), "backend", &place.backend, name)
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
