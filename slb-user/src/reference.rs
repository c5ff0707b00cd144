//! The pages of `docs/reference`, made from the code.
//!
//! A test compares them with what the code says now. `cargo xtask docs` runs that test with [`WRITE`] set,
//! which writes the pages instead.

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use clap::CommandFactory as _;
use slb_common::verdict::{Action, Verdict};

use crate::{
    cli::Cli,
    datapath::OBJECT,
    observe::{fixtures, metrics},
};

mod shell;

/// Set by `cargo xtask docs`.
const WRITE: &str = "SLB_WRITE_REFERENCE";
const HEAD: &str = "<!-- Made from the code by `cargo xtask docs`; changes here are lost. -->\n\n";

#[test]
fn given_the_code_when_the_pages_are_made_from_it_then_they_are_those_in_the_repository() {
    let pages = [
        ("maps.md", maps()),
        ("flags.md", flags()),
        ("verdicts.md", verdicts()),
        ("metrics.md", metrics()),
        ("commands.md", commands()),
    ];
    for (name, text) in pages {
        let path = root().join("docs/reference").join(name);
        let text = format!("{HEAD}{text}");
        if env::var_os(WRITE).is_some() {
            fs::write(path, text).unwrap();
        } else {
            let found = fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "{} is out of date: cargo xtask docs", path.display());
        }
    }
}

#[test]
fn given_the_keys_that_the_parser_knows_when_they_are_sought_then_the_documentation_has_each() {
    let page = read(&root().join("docs/configuration.md"));
    let mut keys = Vec::new();
    for file in sources("slb-user/src/config") {
        let text = read(&file);
        for list in text.split("known: &[").skip(1) {
            let list = list.split(']').next().unwrap_or_default();
            keys.extend(list.split('"').skip(1).step_by(2).map(str::to_owned));
        }
    }
    assert!(keys.len() > 50, "the lists of keys are not where they are looked for: {keys:?}");
    for key in keys {
        // `address`, `[[instance.backend]]`
        let is_there = page.lines().filter(|line| line.starts_with("| ")).any(|line| {
            let cell = line.split('|').nth(1).unwrap_or_default().trim().trim_matches('`');
            cell.trim_matches(['[', ']']).rsplit('.').next() == Some(&key)
        });
        assert!(is_there || page.contains(&format!("[{key}]")), "{key} is not documented");
    }
}

#[test]
fn given_the_documents_when_they_are_sought_in_the_index_then_each_is_there() {
    let docs = root().join("docs");
    let index = read(&docs.join("README.md"));
    let names = |folder: &str| {
        let files = fs::read_dir(docs.join(folder)).unwrap().flatten();
        files.map(|file| file.file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    for folder in ["", "adr/", "reference/"] {
        for name in names(folder) {
            let is_page = Path::new(&name).extension().is_some_and(|extension| extension == "md");
            let link = format!("({folder}{name})");
            assert!(!is_page || name == "README.md" || index.contains(&link), "{link} is missing");
        }
    }
}

/// An item of the sources that has documentation.
struct Item {
    docs: String,
    /// Up to its end, in one line.
    text: String,
    /// Whether the item before it ends in the line above its documentation.
    follows: bool,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Files of Rust below a folder, or beside it with its name, in order; not those of tests.
fn sources(folder: &str) -> Vec<PathBuf> {
    let folder = root().join(folder);
    let mut files = vec![folder.with_extension("rs")];
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries {
        if path.is_dir() {
            files.extend(sources(path.strip_prefix(root()).unwrap().to_str().unwrap()));
        } else {
            files.push(path);
        }
    }
    files.retain(|file| {
        let is_rust = file.extension().is_some_and(|extension| extension == "rs");
        is_rust && file.exists() && !file.ends_with("tests.rs")
    });
    files.sort();
    files.dedup();
    files
}

/// Items whose first line begins with `start`.
fn items(source: &str, start: &str) -> Vec<Item> {
    let mut items = Vec::new();
    let mut docs = Vec::new();
    let mut is_after_item = false;
    let mut follows = false;
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        if let Some(doc) = line.strip_prefix("///") {
            if docs.is_empty() {
                follows = is_after_item;
            }
            docs.push(doc.trim().to_owned());
        } else if line.starts_with(start) && !line.contains(" fn ") && !docs.is_empty() {
            let mut text = line.trim().to_owned();
            while !text.ends_with(';') {
                let Some(next) = lines.next() else { break };
                write!(text, " {}", next.trim()).unwrap();
            }
            items.push(Item { docs: docs.join(" "), text, follows });
            docs.clear();
        } else if !line.starts_with("#[") {
            docs.clear();
        }
        is_after_item = line.ends_with(';');
    }
    items
}

/// Links of rustdoc mean nothing in a page: `[`crate::abi::Listener`]` becomes `Listener`.
fn plain(docs: &str) -> String {
    let mut text = String::new();
    let mut rest = docs;
    while let Some((before, after)) = rest.split_once("[`") {
        let Some((name, after)) = after.split_once("`]") else { break };
        let name = name.rsplit("::").next().unwrap_or(name);
        write!(text, "{before}`{name}`").unwrap();
        rest = after;
    }
    text.push_str(rest);
    text.replace('|', "\\|")
}

fn bytes(count: u64) -> String {
    match count {
        0..1_024 => format!("{count} B"),
        1_024..1_048_576 => format!("{} KiB", count.div_ceil(1_024)),
        _ => format!("{} MiB", count.div_ceil(1_048_576)),
    }
}

fn maps() -> String {
    let object = aya_obj::Object::parse(OBJECT).unwrap();
    let source = read(&root().join("slb-ebpf/src/maps.rs"));
    let mut text = "# Maps\n\nIn the order of `slb-ebpf/src/maps.rs`. [Maps and verdicts](../maps.md) shows dumps. \
        *Size*: entries times key and value as compiled; the agent makes some maps larger, as the configuration \
        asks for, and a per-CPU map has its values once for each CPU.\n\n\
        | map | type | key | value | entries | size | meaning |\n| --- | --- | --- | --- | ---: | ---: | --- |\n"
        .to_owned();
    let items = items(&source, "pub static SLB_");
    assert_eq!(items.len(), object.maps.keys().filter(|name| name.starts_with("SLB_")).count());
    for Item { docs, text: item, .. } in items {
        let item = item.strip_prefix("pub static ").unwrap();
        let (name, rest) = item.split_once(':').unwrap();
        let (kind, parameters) = rest.split_once('=').unwrap().0.trim().split_once('<').unwrap();
        let mut parameters = parameters.trim_end_matches('>').split(',').map(str::trim);
        let first = parameters.next().unwrap_or_default();
        let (key, value) = match kind {
            "HashMap" | "LruHashMap" | "LpmTrie" => (first, parameters.next().unwrap_or_default()),
            "ProgramArray" => ("u32", "program"),
            _ => ("u32", first),
        };
        let map = &object.maps[name];
        let entries = u64::from(map.max_entries());
        // Arrays have no memory for keys.
        let key_size = if kind.ends_with("Array") { 0 } else { u64::from(map.key_size()) };
        let size = bytes(entries * (key_size + u64::from(map.value_size())));
        writeln!(
            text,
            "| `{name}` | {kind} | `{key}` | `{value}` | {entries} | {size} | {} |",
            plain(&docs)
        )
        .unwrap();
    }
    text
}

/// Name, value and documentation.
type Flag = (String, String, String);

/// Groups of integer constants in the layouts of the maps.
fn flags() -> String {
    let mut text =
        "# Flags and numbers in the maps\n\nConstants of `slb-ebpf/common/src/abi.rs`, as \
        `bpftool map dump` shows their values. Those of one table belong to one field.\n"
            .to_owned();
    for file in sources("slb-ebpf/common/src/abi") {
        let source = unnested(&read(&file));
        let mut groups: Vec<Vec<Flag>> = Vec::new();
        for Item { docs, text, follows } in items(&source, "pub const ") {
            let Some((name, value)) = integer(&text) else {
                groups.push(Vec::new());
                continue;
            };
            let row = (name.to_owned(), value, plain(&docs));
            match groups.last_mut() {
                Some(group) if follows => group.push(row),
                _ => groups.push(vec![row]),
            }
        }
        // Numbers of IP protocols are everybody's.
        let is_ours = |group: &&Vec<Flag>| group.len() > 1 && group[0].0 != "TCP";
        for group in groups.iter().filter(is_ours) {
            text.push_str("\n| constant | value | meaning |\n| --- | ---: | --- |\n");
            for (name, value, docs) in group {
                writeln!(text, "| `{}` | {value} | {docs} |", name.replace('.', "::")).unwrap();
            }
        }
    }
    text
}

/// The constants of `flags!`, `bitflags!` and of types of one number as those outside of them, by `Type.NAME`.
fn unnested(source: &str) -> String {
    let mut of = String::new();
    let mut unnest = |line: &str| {
        let text = line.trim_start();
        let of_type = text.strip_prefix("pub struct ").or_else(|| text.strip_prefix("impl "));
        if let Some((name, _)) = of_type.and_then(|it| it.split_once([' ', ':', '('])) {
            of = name.to_owned();
        }
        let constant = text.strip_prefix("pub const ").or_else(|| text.strip_prefix("const "));
        if text == line {
            format!("{line}\n")
        } else if text.starts_with("///") {
            format!("{text}\n")
        } else if let Some((name, value)) = constant.and_then(|it| it.split_once(": Self = Self("))
        {
            format!("pub const {of}.{name}: u32 = {}\n", value.replace(')', ""))
        } else if let Some((name, value)) = constant.and_then(|it| it.split_once(" = "))
            && !name.contains(':')
        {
            format!("pub const {of}.{name}: u32 = {value}\n")
        } else {
            format!("{line}\n")
        }
    };
    source.lines().map(&mut unnest).collect()
}

/// Name and value of `pub const NAME: u32 = 1 << 3;`.
fn integer(item: &str) -> Option<(&str, String)> {
    let (name, rest) = item.strip_prefix("pub const ")?.split_once(':')?;
    let (kind, value) = rest.split_once('=')?;
    if !["u8", "u16", "u32"].contains(&kind.trim()) {
        return None;
    }
    let value = value.trim().trim_end_matches(';');
    let number = |text: &str| match text.trim().strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(&digits.replace('_', ""), 16).ok(),
        None => text.trim().replace('_', "").parse::<u64>().ok(),
    };
    let value = match value.split_once("<<") {
        Some((number_of, shift)) => number(number_of)? << number(shift)?,
        None if value.ends_with("::MAX") => return Some((name, value.to_owned())),
        None => number(value)?,
    };
    Some((name, value.to_string()))
}

fn verdicts() -> String {
    let source = read(&root().join("slb-ebpf/common/src/verdict.rs"));
    let mut text = "# Verdicts\n\nEvery frame ends in exactly one. *sent*: `XDP_TX` or `XDP_REDIRECT`; *passed*: on \
        to the kernel's stack. [Operations](../operations.md#verdict-by-verdict) says what to do about each.\n\n\
        | slot | verdict | action | meaning |\n| ---: | --- | --- | --- |\n"
        .to_owned();
    for verdict in Verdict::ALL {
        let row = format!("    {verdict:?} = ");
        let before = source.split(&row).next().unwrap();
        let docs: Vec<_> = before
            .lines()
            .rev()
            .map_while(|line| line.trim_start().strip_prefix("///").map(str::trim))
            .collect();
        let docs = docs.into_iter().rev().collect::<Vec<_>>().join(" ");
        assert!(!docs.is_empty(), "{verdict:?}");
        let action = match verdict.action() {
            Action::Transmit => "sent",
            Action::Pass => "passed",
            Action::Drop => "dropped",
        };
        // Links name the variant, the table the label.
        let docs = Verdict::ALL.iter().fold(docs, |docs, other| {
            docs.replace(&format!("[`Verdict::{other:?}`]"), &format!("`{}`", other.label()))
        });
        let (slot, label) = (*verdict as u32, verdict.label());
        writeln!(text, "| {slot} | `{label}` | {action} | {} |", plain(&docs)).unwrap();
    }
    text
}

/// Of a status with something in every field, so every metric is there.
fn metrics() -> String {
    let encoded = metrics::encode(fixtures::status()).unwrap();
    let mut text = "# Metrics\n\nWhat `GET /metrics` answers with. Counters are kept in the maps, so they go on when \
        the agent is started again, unless the meaning says otherwise.\n\n\
        | metric | type | labels | meaning |\n| --- | --- | --- | --- |\n"
        .to_owned();
    for block in encoded.split("# HELP ").skip(1) {
        let (_, help) = block.lines().next().unwrap().split_once(' ').unwrap();
        let mut lines = block.lines().skip(1);
        let kind = lines.find_map(|line| line.strip_prefix("# TYPE ")).unwrap();
        let kind = kind.rsplit(' ').next().unwrap();
        let sample = lines.find(|line| !line.starts_with('#')).unwrap();
        let name = sample.split(['{', ' ']).next().unwrap();
        let labels =
            sample.split_once('{').map_or("", |(_, rest)| rest.rsplit_once('}').unwrap().0);
        let labels: Vec<_> = labels
            .split("\",")
            .filter_map(|label| Some(format!("`{}`", label.split_once('=')?.0)))
            .collect();
        writeln!(text, "| `{name}` | {kind} | {} | {} |", labels.join(", "), plain(help)).unwrap();
    }
    text
}

fn commands() -> String {
    let mut text = "# Commands\n\nWhat `slb COMMAND --help` prints. Exit codes: 0 done, 1 failed, 2 wrong usage or \
        invalid configuration, 3 no agent answers.\n"
        .to_owned();
    let mut command = Cli::command();
    command.build();
    add_command(&mut text, &command);
    text
}

fn add_command(text: &mut String, command: &clap::Command) {
    if !command.has_subcommands() {
        let usage = command.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage:").trim();
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        write!(text, "\n## `{usage}`\n\n{}.\n", about.trim_end_matches('.')).unwrap();
        let shown = command.get_arguments().filter(|argument| {
            !argument.is_hide_set() && !["help", "version"].contains(&argument.get_id().as_str())
        });
        let mut head = Some("\n| argument | default | meaning |\n| --- | --- | --- |\n");
        for argument in shown {
            text.push_str(head.take().unwrap_or_default());
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            let defaults: Vec<_> = argument
                .get_default_values()
                .iter()
                .map(|value| format!("`{}`", value.to_string_lossy()))
                .filter(|value| value != "`false`")
                .collect();
            // clap puts brackets around what is optional.
            let name = argument.to_string();
            writeln!(text, "| `{name}` | {} | {} |", defaults.join(", "), plain(&help)).unwrap();
        }
    }
    for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
        add_command(text, command);
    }
}
