//! From the text of a file to a [`Config`], or to every mistake in it.
//!
//! Each table is read into a draft that may have gaps; a gap always comes with a mistake that says
//! why. Rules that compare drafts skip the gaps, so that one slip is reported once. Only a file
//! without mistakes becomes a `Config`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use toml::{Spanned, de::DeTable};

use self::{
    gateway::gateway,
    instance::Instance,
    read::{Field, Keys, Raw},
};
use super::{
    Config,
    report::{Findings, LoadError, Mistake, Places, Report},
    source::ConfigSource,
};

#[cfg(test)]
mod cloud;
mod gateway;
mod group;
mod health_check;
mod instance;
mod listener;
mod read;
mod syntax;
#[cfg(test)]
mod tests;
mod values;

/// Reads and parses a configuration; the second value is the warnings.
///
/// # Errors
///
/// The source cannot be read, or its text is wrong.
pub fn load(source: &dyn ConfigSource) -> Result<(Config, Vec<Mistake>), LoadError> {
    Ok(parse(source.path(), &source.read()?.text)?)
}

/// Parses `text`; the second value is the warnings. `path` only names the file in messages.
///
/// # Errors
///
/// Every mistake in `text`.
pub fn parse(path: &Path, text: &str) -> Result<(Config, Vec<Mistake>), Report> {
    let places = Places::new(path, text);
    let (tree, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return finish(&tree, Findings::default(), &places);
    }
    let readable = syntax::readable(text, (tree, errors));
    let findings = Findings::new(readable.errors, readable.broken, readable.lost);
    let (tree, _) = DeTable::parse_recoverable(&readable.text);
    finish(&tree, findings, &places)
}

fn finish(
    tree: &Spanned<DeTable<'_>>,
    findings: Findings,
    places: &Places<'_>,
) -> Result<(Config, Vec<Mistake>), Report> {
    let config = file(Raw::new(tree.get_ref(), 0, &findings));
    let warnings = findings.finish(places)?;
    Ok((config.expect("a file without mistakes has no gaps"), warnings))
}

/// Where the agent listens that has this configuration. Mistakes elsewhere in the text do not matter.
#[must_use]
pub fn api(text: &str) -> PathBuf {
    let (tree, _) = DeTable::parse_recoverable(gateway_of(text).unwrap_or(text));
    let gateway = tree.get_ref().get("gateway").and_then(|gateway| gateway.get_ref().as_table());
    let api = gateway.and_then(|gateway| gateway.get("api")?.get_ref().as_str());
    PathBuf::from(api.unwrap_or(gateway::DEFAULT_API))
}

/// The part of a file that has `[gateway]`, if it is easily told and another table follows in `text`, which may be the
/// beginning of the file.
#[must_use]
pub fn gateway_before_others(text: &str) -> Option<&str> {
    gateway_of(text).filter(|part| !text.ends_with(*part))
}

/// The part of a file that has `[gateway]`, if it is easily told: files can be large, and commands are not to wait.
fn gateway_of(text: &str) -> Option<&str> {
    const HEADER: &str = "[gateway]";
    let begin = text.strip_prefix(HEADER).map(|_| 0).or_else(|| text.find("\n[gateway]"))?;
    let rest = &text[begin..];
    let inside = rest.find(HEADER)? + HEADER.len();
    let end = rest[inside..].find("\n[").map_or(rest.len(), |end| inside + end);
    let part = &rest[..end];
    // An array over several lines, or a text, may look like a header.
    let is_whole = DeTable::parse_recoverable(part).1.is_empty();
    is_whole.then_some(part)
}

const FILE: Keys = Keys { known: &["gateway", "instance"], later: &[] };

fn file(raw: Raw<'_>) -> Option<Config> {
    let table = raw.open(String::new(), &FILE);
    let gateway = match table.table("gateway", "[gateway]") {
        Field::Absent => {
            let example = "[gateway] with interfaces = [\"eth0\"]";
            table.report_absent("gateway", example);
            None
        }
        Field::Bad => None,
        Field::Good(found) => Some(gateway(found.value)),
    };
    let instances = match table.tables("instance", "[[instance]]") {
        Field::Bad => None,
        Field::Good(found) if !found.value.is_empty() => Some(found.value),
        _ => {
            table.report_absent("instance", "[[instance]] with name, vips, backends and listeners");
            None
        }
    };
    let instances: Vec<Instance<'_>> = instances?
        .into_iter()
        .enumerate()
        .map(|(index, raw)| Instance::read(raw, index + 1))
        .collect();

    instance::check_together(&instances);
    if let Some(gateway) = &gateway {
        let backends = instances.iter().flat_map(Instance::backends);
        backends.for_each(|backend| backend.check_region(&gateway.region));
    }

    let instances: Vec<_> = instances.into_iter().map(|it| it.build().map(Arc::new)).collect();
    Some(Config {
        gateway: gateway?.build()?,
        instances: instances.into_iter().collect::<Option<_>>()?,
    })
}
