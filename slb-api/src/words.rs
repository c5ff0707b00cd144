//! Enums whose values have one word each: in the configuration file, in JSON, in commands and in metrics.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Gives an enum the words that the file, the commands and the metrics use for its values.
#[macro_export]
macro_rules! words {
    ($type:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $type {
            /// Every value, with its word.
            pub const WORDS: &[(&str, Self)] = &[$(($word, Self::$variant)),+];

            /// The word for this value.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

/// Transport protocol of a listener.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

words!(Protocol { Tcp = "tcp", Udp = "udp" });

/// How a backend is chosen for a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scheduler {
    /// Weighted consistent hash of the 4-tuple (Maglev).
    Tch,
    /// The same of the source address.
    Sch,
    /// The same of the QUIC connection ID, unless that names a backend.
    Qch,
    /// Weighted round robin.
    Wrr,
    /// Round robin among backends whose weight is not 0; other weights make no difference.
    Rr,
    /// Weighted least connections.
    Wlc,
}

words!(Scheduler {
    Tch = "tch",
    Sch = "sch",
    Qch = "qch",
    Wrr = "wrr",
    Rr = "rr",
    Wlc = "wlc"
});

impl Scheduler {
    /// Whether a hash alone chooses the backend, so that most flows need no entry in the flow table.
    #[must_use]
    pub const fn is_by_hash(self) -> bool {
        matches!(self, Self::Tch | Self::Sch)
    }
}

/// A word that names no value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownWord {
    word: String,
    known: &'static str,
}

impl UnknownWord {
    /// The value of a word; `known` lists the words for people.
    pub(crate) fn find<T: Copy>(
        words: &[(&str, T)],
        word: &str,
        known: &'static str,
    ) -> Result<T, Self> {
        let found = words.iter().find(|(known, _)| *known == word).map(|(_, value)| *value);
        found.ok_or_else(|| Self { word: word.to_owned(), known })
    }
}

impl fmt::Display for UnknownWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not known; write {}", self.word, self.known)
    }
}

impl std::error::Error for UnknownWord {}

impl FromStr for Protocol {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, UnknownWord> {
        UnknownWord::find(Self::WORDS, word, "tcp or udp")
    }
}
