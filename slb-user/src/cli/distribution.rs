//! `slb distribution`.

use std::{io::IsTerminal as _, time::Duration};

use slb_api::{BusiestClient, FlowFilter, Flows, Status};

use super::{
    Exit,
    ask::{Agent, QueryResult},
    output::{print, print_error, print_json},
    status::{align, lines, percent, table},
};
use crate::distribution::{self, Distribution};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: Agent,
    /// How long to count new flows.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    window: Duration,
    /// Only this listener, such as tcp/80.
    #[arg(long, value_name = "PROTOCOL/PORT")]
    listener: Option<String>,
    /// For programs.
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// What happened between two looks, as far as it was asked for.
    fn chosen(&self, before: &Status, after: &Status) -> Vec<Distribution> {
        let mut found = distribution::between(before, after);
        if let Some(listener) = &self.listener {
            found.retain(|distribution| distribution.listener == *listener);
        }
        found
    }
}

pub(super) fn distribution(arguments: &Arguments) -> anyhow::Result<Exit> {
    if std::io::stderr().is_terminal() {
        print_error(format_args!("counting for {}", humantime::format_duration(arguments.window)));
    }
    let looks = arguments.agent.ask(async |agent| {
        let before: Status = agent.get("/v1/status").await?;
        // There is nothing to count for a listener that is not there.
        if !arguments.chosen(&before, &before).is_empty() {
            tokio::time::sleep(arguments.window).await;
        }
        let after = agent.get("/v1/status").await?;
        let mut found = arguments.chosen(&before, &after);
        for distribution in found.iter_mut().filter(|found| found.is_open()) {
            let listener = format!("{} {}", distribution.instance, distribution.listener);
            let filter =
                FlowFilter { listener: Some(listener), limit: Some(0), ..FlowFilter::default() };
            let flows: Flows = agent.get_with("/v1/flows", &filter).await?;
            if let Some(BusiestClient { client, flows: count }) = flows.busiest {
                distribution.note_busiest(&client.to_string(), count, flows.total);
            }
        }
        Ok(found)
    })?;
    let found = match looks {
        QueryResult::Answer(found) => found,
        QueryResult::Exit(exit) => return Ok(exit),
    };
    if let (Some(listener), true) = (&arguments.listener, found.is_empty()) {
        print_error(format_args!("there is no listener '{listener}'; `slb status` lists them"));
        return Ok(Exit::Invalid);
    }
    if arguments.json {
        print_json(&found)?;
    } else {
        print(found.iter().map(render).collect::<String>())?;
    }
    Ok(Exit::Done)
}

fn render(distribution: &Distribution) -> String {
    let Distribution { instance, listener, scheduler, family, unit, total, backends, .. } =
        distribution;
    let mut table = table(&["backend", "address", "weight", "expected", "actual", unit, ""]);
    for part in backends {
        table.add_row([
            part.backend.clone(),
            part.address.clone(),
            part.weight.map_or_else(|| "-".to_owned(), |weight| weight.to_string()),
            percent(part.expected_share),
            percent(part.share),
            part.count.to_string(),
            match (part.differs, part.sigmas) {
                (true, Some(sigmas)) => format!("{sigmas:+.1} sigma"),
                (true, None) => "differs".to_owned(),
                (false, _) => String::new(),
            },
        ]);
    }
    align(&mut table, &[2, 3, 4, 5]);
    format!(
        "{instance} {listener} by {scheduler}, {family}: {total} new {unit}\n{}  {}\n\n",
        lines(&table, "  "),
        distribution.verdict
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::fixtures;

    #[test]
    fn given_a_distribution_when_rendered_then_it_reads_like_this() {
        let mut before = fixtures::status();
        let after = fixtures::status();
        let backends = &mut before.instances[0].listeners[0].backends;
        backends.truncate(1);
        backends[0].flows = Some(2);
        let found = distribution::between(&before, &after);
        let expected = "\
shop tcp/80 by tch, IPv4: 10 new flows
   backend  address        weight  expected   actual  flows
   web-1    10.0.0.1:8080     100    87.5 %  100.0 %     10
  too few flows to tell

";
        assert_eq!(render(&found[0]), expected);
    }
}
