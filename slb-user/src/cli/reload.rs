//! `slb reload` and `slb plan`.

use std::path::PathBuf;

use slb_api::{ConfigFile, Reloaded};

use super::{
    Exit,
    ask::{Agent, Query, QueryResult},
    output::{print, print_error, print_json},
};
use crate::config::{
    DEFAULT_PATH,
    source::{ConfigSource as _, Document, FileSource},
};

#[derive(Debug, clap::Args)]
pub(super) struct PlanArguments {
    /// Configuration file; it also says where the agent is.
    #[arg(value_name = "FILE", default_value = DEFAULT_PATH)]
    file: PathBuf,
    /// The agent's socket; by default the one that the file names.
    #[arg(long, value_name = "SOCKET")]
    api: Option<PathBuf>,
    /// For programs.
    #[arg(long)]
    json: bool,
}

pub(super) fn reload(arguments: &Query) -> anyhow::Result<Exit> {
    let answer = arguments.agent.ask(async |agent| agent.post("/v1/reload", &()).await)?;
    tell(answer, arguments.json, |reloaded| format!("generation {}", reloaded.generation))
}

pub(super) fn plan(arguments: &PlanArguments) -> anyhow::Result<Exit> {
    let agent = Agent::of(arguments.file.clone(), arguments.api.clone());
    let text = match FileSource::new(&arguments.file).read() {
        Ok(Document { text, .. }) => text,
        Err(error) => {
            print_error(error);
            return Ok(Exit::Invalid);
        }
    };
    let file = ConfigFile { path: arguments.file.clone(), text };
    let answer = agent.ask(async |agent| agent.post("/v1/plan", &file).await)?;
    tell(answer, arguments.json, |_| "nothing was done".to_owned())
}

/// Prints what was done, or would be; `end` says which.
pub(super) fn tell(
    answer: QueryResult<Reloaded>,
    json: bool,
    end: impl FnOnce(&Reloaded) -> String,
) -> anyhow::Result<Exit> {
    let reloaded = match answer {
        QueryResult::Answer(reloaded) => reloaded,
        QueryResult::Exit(exit) => return Ok(exit),
    };
    if json {
        print_json(&reloaded)?;
        return Ok(Exit::Done);
    }
    let mut text: String = reloaded.changes.iter().map(|change| format!("{change}\n")).collect();
    let count = match reloaded.changes.len() {
        0 => "no changes".to_owned(),
        1 => "1 change".to_owned(),
        count => format!("{count} changes"),
    };
    text += &format!("{count}; {}\n", end(&reloaded));
    print(text)?;
    Ok(Exit::Done)
}
