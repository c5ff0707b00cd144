//! Edits of the file by command: its comments and its order stay.

mod line_ends;
mod model;
mod span;
#[cfg(test)]
mod tests;
mod text;

use slb_api::{Edit, Place};
use toml_edit::DocumentMut;

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
    /// Several groups have a backend of that name.
    #[error("backend '{wanted}' is in groups {}; name one of them with --group", .groups.join(" and "))]
    Ambiguous {
        /// Its name in the command.
        wanted: String,
        /// The groups.
        groups: Vec<String>,
    },
    /// A group with a primary and a secondary has just these two.
    #[error(
        "group {group:?} has a primary and a secondary, and no others; write another backend in place of one of them \
         into the file, and `slb reload`"
    )]
    Pair {
        /// Its name.
        group: String,
    },
    /// They do not share new flows.
    #[error(
        "group {group:?} has a primary and a secondary, which have no weights; `slb backend drain` gives the flows of \
         the one to the other"
    )]
    PairWithoutWeights {
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

/// A file's text after the edit. Whether that is valid is for [`super::parse()`] to say.
///
/// # Errors
///
/// There is nothing to be edited, or the text is no TOML.
pub fn apply(edit: &Edit, whole: &str) -> Result<String, EditError> {
    if memchr::memchr(b'\r', whole.as_bytes()).is_none() {
        return apply_plain(edit, whole);
    }
    let plain = whole.replace("\r\n", "\n");
    Ok(line_ends::restore(whole, &apply_plain(edit, &plain)?))
}

/// The same of a text whose lines end in LF, as `toml_edit` writes them.
fn apply_plain(edit: &Edit, whole: &str) -> Result<String, EditError> {
    // To read a whole file with thousands of backends takes a tenth of a second.
    for part in span::parts(whole, edit.instance()) {
        let Ok(mut file) = whole[part.clone()].parse() else { continue };
        if text::instance(&mut file, edit.instance()).is_ok() {
            text::change(&mut file, edit)?;
            return Ok([&whole[..part.start], &file.to_string(), &whole[part.end..]].concat());
        }
    }
    let mut file = whole.parse::<DocumentMut>().map_err(EditError::Toml)?;
    text::change(&mut file, edit)?;
    Ok(file.to_string())
}
