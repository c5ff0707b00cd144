//! `slb events`.

use std::time::{Duration, SystemTime};

use slb_api::{Event, EventFilter};

use super::{
    Exit,
    ask::{Query, QueryResult},
    output::{plain_json, print},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Go on with what happens from now on.
    #[arg(long, short)]
    follow: bool,
    #[command(flatten)]
    query: Query,
}

/// How often an agent is asked for what is new.
const PERIOD: Duration = Duration::from_millis(500);

pub(super) fn events(arguments: &Arguments) -> anyhow::Result<Exit> {
    let Arguments { follow, query } = arguments;
    let asked = query.agent.ask(async |agent| {
        let mut after = 0;
        loop {
            let filter = EventFilter { after: Some(after) };
            let events: Vec<Event> = agent.get_with("/v1/events", &filter).await?;
            let mut text = String::new();
            for event in &events {
                let json = || serde_json::to_string(event).map(|json| plain_json(&json));
                text += &if query.json { json()? } else { tell(event) };
                text.push('\n');
                after = event.number;
            }
            let printed = print(text);
            if printed.is_err() || !follow {
                return Ok(printed);
            }
            tokio::time::sleep(PERIOD).await;
        }
    })?;
    match asked {
        QueryResult::Answer(printed) => {
            printed?;
            Ok(Exit::Done)
        }
        QueryResult::Exit(exit) => Ok(exit),
    }
}

fn tell(event: &Event) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(event.at_seconds.max(0.0));
    format!("{}  {:8}  {}", humantime::format_rfc3339_millis(at), event.kind, event.text)
}

#[cfg(test)]
mod tests {
    use slb_api::EventKind;

    use super::*;

    #[test]
    fn given_an_event_when_told_then_it_reads_like_this() {
        let text = "shop tcp/80: web-1 10.0.0.1:8080 is healthy".to_owned();
        let event = Event { number: 1, at_seconds: 1.5, kind: EventKind::Health, text };
        let expected =
            "1970-01-01T00:00:01.500Z  health    shop tcp/80: web-1 10.0.0.1:8080 is healthy";
        assert_eq!(tell(&event), expected);
    }
}
