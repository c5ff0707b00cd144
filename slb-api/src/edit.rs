//! Changes of the configuration.

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Protocol;

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
    /// Whether a listener is in use.
    EnableListener {
        /// Name of its instance.
        instance: String,
        /// Its protocol.
        protocol: Protocol,
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

impl Edit {
    /// Name of the instance that is edited.
    #[must_use]
    pub fn instance(&self) -> &str {
        match self {
            Self::AddBackend { place, .. }
            | Self::RemoveBackend { place }
            | Self::SetWeight { place, .. }
            | Self::DrainBackend { place, .. } => &place.instance,
            Self::EnableListener { instance, .. } => instance,
        }
    }
}

/// `POST /v1/plan` takes this: a file that may become the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConfigFile {
    /// Names it in messages.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

/// `POST /v1/reload`: the file was taken over. `POST /v1/plan`: it could be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reloaded {
    /// Of the configuration that is in force now; counts those that differ from the one before.
    pub generation: u64,
    /// What is different, one line each: `+` added, `-` removed, `~` changed.
    pub changes: Vec<String>,
    /// Of the file.
    pub warnings: Vec<String>,
}
