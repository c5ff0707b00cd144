//! Edits of the file by command: its comments and its order stay.

mod model;
mod span;
#[cfg(test)]
mod tests;
mod text;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use toml_edit::DocumentMut;
use utoipa::ToSchema;

/// What to change; `POST /v1/edit` takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "edit", rename_all = "kebab-case")]
pub enum Edit {
    /// A further backend.
    AddBackend {
        /// Where.
        place: Place,
        /// Its addresses.
        #[schema(value_type = Vec<String>)]
        addresses: Vec<IpAddr>,
        /// `None` in the default group only.
        port: Option<u16>,
        /// `None`: the default.
        weight: Option<u32>,
    },
    /// One backend less.
    RemoveBackend {
        /// Which.
        place: Place,
    },
    /// Another weight.
    SetWeight {
        /// Whose.
        place: Place,
        /// 0 to 100.
        weight: u32,
    },
    /// Whether a backend is drained.
    DrainBackend {
        /// Which.
        place: Place,
        /// `false`: not any more.
        drain: bool,
    },
    /// Whether a listener is balanced.
    EnableListener {
        /// Name of its instance.
        instance: String,
        /// `tcp` or `udp`.
        protocol: String,
        /// On the VIPs.
        port: u16,
        /// `false`: it is not.
        enabled: bool,
    },
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// Name of the instance.
    pub instance: String,
    /// Name of the group; `None`: the default group.
    pub group: Option<String>,
    /// Name of the backend.
    pub backend: String,
}

/// What cannot be done to a file, and what could.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EditError(String);

impl Edit {
    /// A file's text after the edit. Whether that is valid is for [`super::parse()`] to say.
    ///
    /// # Errors
    ///
    /// There is nothing to be edited, or the text is no TOML.
    pub fn apply(&self, whole: &str) -> Result<String, EditError> {
        // To read a whole file with thousands of backends takes a tenth of a second.
        for part in span::parts(whole, self.instance()) {
            let Ok(mut file) = whole[part.clone()].parse() else { continue };
            if text::instance(&mut file, self.instance()).is_ok() {
                text::change(&mut file, self)?;
                return Ok([&whole[..part.start], &file.to_string(), &whole[part.end..]].concat());
            }
        }
        let mut file = whole
            .parse::<DocumentMut>()
            .map_err(|error| EditError(format!("the file is not valid TOML: {error}")))?;
        text::change(&mut file, self)?;
        Ok(file.to_string())
    }

    /// Name of the instance that it is about.
    fn instance(&self) -> &str {
        match self {
            Self::AddBackend { place, .. }
            | Self::RemoveBackend { place }
            | Self::SetWeight { place, .. }
            | Self::DrainBackend { place, .. } => &place.instance,
            Self::EnableListener { instance, .. } => instance,
        }
    }
}
