//! What the commands that ask the agent have in common.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use hyper::StatusCode;
use serde::Serialize;

use super::{
    ConfigFile, Exit,
    output::{print, print_error, print_json},
};
use crate::{
    api::{ClientError, Connection},
    config::{self, DEFAULT_PATH, source::LARGEST_FILE},
};

/// Where the agent is.
#[derive(Debug, clap::Args)]
pub(super) struct Agent {
    #[command(flatten)]
    file: ConfigFile,
    /// The agent's socket; by default the one that the configuration file names.
    #[arg(long, value_name = "SOCKET")]
    api: Option<PathBuf>,
}

/// The agent to ask, and the format of its answer.
#[derive(Debug, clap::Args)]
pub(super) struct Query {
    #[command(flatten)]
    pub agent: Agent,
    /// For programs.
    #[arg(long)]
    pub json: bool,
}

impl Query {
    /// Asks, and shows the answer: as JSON, or as `render` has it.
    pub(super) fn show<T: Serialize>(
        &self,
        question: impl AsyncFnOnce(&mut Connection) -> Result<T, ClientError>,
        render: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<Exit> {
        let answer = match self.agent.ask(question)? {
            QueryResult::Answer(answer) => answer,
            QueryResult::Exit(exit) => return Ok(exit),
        };
        if self.json {
            print_json(&answer)?;
        } else {
            print(render(&answer))?;
        }
        Ok(Exit::Done)
    }
}

/// How a query has ended.
pub(super) enum QueryResult<T> {
    /// With an answer.
    Answer(T),
    /// Without; stderr says why.
    Exit(Exit),
}

impl Agent {
    /// The one that a file names, unless `api` does.
    pub(super) const fn of(config: PathBuf, api: Option<PathBuf>) -> Self {
        Self { file: ConfigFile { config }, api }
    }

    /// The socket that the file names. `[gateway]` is its first part as a rule, and the rest can be large.
    ///
    /// # Errors
    ///
    /// A file that the user has named cannot be read: the default socket may be another agent's. The default file may be
    /// closed to users who can use the socket.
    fn named(&self) -> anyhow::Result<PathBuf> {
        const BEGINNING: u64 = 1 << 16;
        let source = self.file.source();
        let read = |most| match source.read_lossy(most) {
            Err(_) if self.file.config == Path::new(DEFAULT_PATH) => Ok(String::new()),
            read => read.with_context(|| {
                let path = self.file.config.display();
                format!("cannot read {path}, which names the agent's socket; or name that by --api")
            }),
        };
        let beginning = read(BEGINNING)?;
        match config::gateway_before_others(&beginning) {
            Some(gateway) => Ok(config::api(gateway)),
            None => Ok(config::api(&read(LARGEST_FILE)?)),
        }
    }

    /// Connects to the agent, and asks it.
    pub(super) fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&mut Connection) -> Result<T, ClientError>,
    ) -> anyhow::Result<QueryResult<T>> {
        let socket = match &self.api {
            Some(socket) => socket.clone(),
            None => self.named()?,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")?;
        let answer = runtime.block_on(async {
            let mut connection = Connection::open(&socket).await?;
            question(&mut connection).await
        });
        match answer {
            Ok(answer) => Ok(QueryResult::Answer(answer)),
            Err(error @ ClientError::NoAgent { .. }) => {
                print_error(error);
                Ok(QueryResult::Exit(Exit::NoAgent))
            }
            Err(ClientError::Refused { status: StatusCode::UNPROCESSABLE_ENTITY, reason }) => {
                print_error(format_args!("{reason}\nnothing was changed"));
                Ok(QueryResult::Exit(Exit::Invalid))
            }
            Err(ClientError::Refused { status: StatusCode::CONFLICT, reason }) => {
                print_error(format_args!("{reason}\nnothing was changed"));
                Ok(QueryResult::Exit(Exit::Failed))
            }
            Err(error) => Err(error.into()),
        }
    }
}
