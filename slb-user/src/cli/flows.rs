//! `slb flows` and `slb explain`.

use std::net::{IpAddr, SocketAddr};

use slb_api::{
    ExplainRequest, ExplainResponse, FlowFilter, FlowStatus, Flows, FragmentPart, PacketProtocol,
};

use super::{
    Exit,
    ask::Query,
    output::print_error,
    status::{align, lines, table},
};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only flows through this listener, such as tcp/80 or "shop tcp/80".
    #[arg(long)]
    listener: Option<String>,
    /// Only flows of this backend.
    #[arg(long)]
    backend: Option<String>,
    /// Show at most so many.
    #[arg(long, default_value_t = 1_000)]
    limit: usize,
    #[command(flatten)]
    query: Query,
}

pub(super) fn flows(arguments: Arguments) -> anyhow::Result<Exit> {
    let Arguments { listener, backend, limit, query } = arguments;
    let filter = FlowFilter { listener, backend, limit: Some(limit) };
    query.show(async |agent| agent.get_with("/v1/flows", &filter).await, render)
}

fn render(found: &Flows) -> String {
    let Flows { total, flows, busiest: _ } = found;
    let mut text = String::new();
    if !flows.is_empty() {
        let mut table =
            table(&["listener", "client", "vip", "backend", "address", "state", "expires"]);
        for flow in flows {
            let FlowStatus { listener, client, vip, backend, to, state, .. } = flow.clone();
            let expires = format!("{} s", flow.expires_seconds);
            table.add_row([
                listener.unwrap_or_default(),
                client.to_string(),
                vip.to_string(),
                backend,
                to.map(|to| to.to_string()).unwrap_or_default(),
                state.to_string(),
                expires,
            ]);
        }
        align(&mut table, &[6]);
        text += &lines(&table, "");
    }
    let shown = flows.len() as u64;
    let more = if shown < *total { format!(", {shown} of them shown") } else { String::new() };
    text + &format!("{total} flows have an entry{more}; settled slots of tch and sch need none\n")
}

#[derive(Debug, clap::Args)]
pub(super) struct ExplainArguments {
    /// tcp, udp, or icmp: an echo request.
    protocol: PacketProtocol,
    /// The client's address and port, such as 198.51.100.7:40000; an IPv6 address is in brackets. With icmp an address.
    #[arg(value_name = "SRC:PORT", value_parser = end)]
    src: SocketAddr,
    /// The VIP and port that it talks to. With icmp an address.
    #[arg(value_name = "VIP:PORT", value_parser = end)]
    dst: SocketAddr,
    /// The packet is in the middle of a TCP connection, and not its first.
    #[arg(long)]
    established: bool,
    /// TTL or hop limit with which it arrives.
    #[arg(long, default_value_t = 64)]
    ttl: u8,
    /// It is a fragment: first or later.
    #[arg(long, value_name = "PART")]
    fragment: Option<FragmentPart>,
    /// Identification of the packet that it is a later fragment of; without it, one whose first fragment was not seen.
    #[arg(long, value_name = "NUMBER", requires = "fragment")]
    fragment_id: Option<u32>,
    /// It is an ICMP error about such a packet, on its way to SRC: give a VIP as SRC for one about what the VIP has sent.
    #[arg(long)]
    icmp_error: bool,
    /// The interface that it comes in by: whether its source may do that is looked at only then.
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    #[command(flatten)]
    query: Query,
}

pub(super) fn explain(arguments: ExplainArguments) -> anyhow::Result<Exit> {
    let ExplainArguments { protocol, src, dst, query, .. } = arguments;
    if protocol != PacketProtocol::Icmp && (src.port() == 0 || dst.port() == 0) {
        let (of, at) = if src.port() == 0 { ("SRC:PORT", src) } else { ("VIP:PORT", dst) };
        print_error(format_args!("{of}: {} has no port", at.ip()));
        return Ok(Exit::Invalid);
    }
    let question = ExplainRequest {
        established: arguments.established,
        ttl: Some(arguments.ttl),
        fragment: arguments.fragment,
        fragment_id: arguments.fragment_id,
        icmp_error: arguments.icmp_error,
        interface: arguments.interface,
        ..ExplainRequest::new(protocol, src, dst)
    };
    query.show(async |agent| agent.get_with("/v1/explain", &question).await, tell)
}

/// An address and port, or an address alone: port 0.
fn end(text: &str) -> Result<SocketAddr, std::net::AddrParseError> {
    text.parse().or_else(|error| {
        let addr = text.parse::<IpAddr>().map_err(|_| error)?;
        Ok(SocketAddr::new(addr, 0))
    })
}

fn tell(explained: &ExplainResponse) -> String {
    let width = explained.steps.iter().map(|[what, _]| what.len()).max().unwrap_or(0);
    let steps = explained.steps.iter().map(|[what, found]| format!("{what:width$}  {found}\n"));
    let mut text: String = steps.collect();
    let ExplainResponse { verdict, backend, to, from, .. } = explained;
    let verdict = verdict.as_deref().unwrap_or("cannot be told");
    text += &format!("{:width$}  {verdict}", "verdict");
    if let (Some(backend), Some(to)) = (backend, to) {
        text += &format!(": to {backend}, {to}");
    }
    if let Some(from) = from {
        text += &format!(", which sees {from}");
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use slb_api::FlowState;

    use super::*;

    #[test]
    fn given_an_explanation_when_told_then_it_reads_like_this() {
        let step = |what: &str, found: &str| [what.to_owned(), found.to_owned()];
        let explained = ExplainResponse {
            steps: vec![step("address", "a VIP"), step("slot", "7 of 16381: web-1; settled")],
            verdict: Some("forwarded".to_owned()),
            backend: Some("web-1".to_owned()),
            to: Some("10.0.0.1:8080".to_owned()),
            from: Some("198.51.100.7:4000".to_owned()),
        };
        let expected = "\
address  a VIP
slot     7 of 16381: web-1; settled
verdict  forwarded: to web-1, 10.0.0.1:8080, which sees 198.51.100.7:4000
";
        assert_eq!(tell(&explained), expected);
        let denied = ExplainResponse {
            steps: Vec::new(),
            verdict: Some("denied".to_owned()),
            backend: None,
            to: None,
            from: None,
        };
        assert_eq!(tell(&denied), "verdict  denied\n");
    }

    #[test]
    fn given_flows_when_rendered_then_it_says_how_many_there_are() {
        let flow = FlowStatus {
            listener: Some("shop tcp/80".to_owned()),
            client: "198.51.100.7:4000".parse().unwrap(),
            vip: "192.0.2.1:80".parse().unwrap(),
            backend: "web-1".to_owned(),
            to: Some("10.0.0.1:8080".parse().unwrap()),
            port: 4_000,
            state: FlowState::Established,
            expires_seconds: 899,
        };
        let text = render(&Flows { total: 9, flows: vec![flow], busiest: None });
        assert!(text.contains("198.51.100.7:4000  192.0.2.1:80  web-1"), "{text}");
        assert!(text.contains("899 s\n9 flows have an entry, 1 of them shown"), "{text}");
        assert!(
            render(&Flows { total: 0, flows: Vec::new(), busiest: None }).starts_with("0 flows")
        );
    }
}
