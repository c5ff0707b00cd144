//! Questions and orders to the kernel over rtnetlink, with errors as the kernel gave them.

use std::{future::poll_fn, io, os::fd::AsFd, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _};
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::{
    Handle,
    packet_core::{
        NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::RouteNetlinkMessage,
};
use tokio::task::AbortHandle;

use crate::rights::{ORDER, RECEIVE_BUFFER};

/// The kernel answers at once; an answer this late was lost, and waiting on would hang the agent.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a dump is repeated that the table's own changes have interrupted.
const DUMP_ATTEMPTS: usize = 8;

/// A socket for questions; multicast events come through another one, so that a flood of them
/// cannot push out answers.
#[derive(Clone, Debug)]
pub(super) struct Rtnl(Handle);

impl Rtnl {
    /// Opens the socket; the handle ends the task that serves it.
    pub(super) fn open() -> io::Result<(Self, AbortHandle)> {
        let (mut connection, handle, _) = rtnetlink::new_connection()?;
        // The end of a dump carries the flag that says whether the dump is consistent.
        connection.set_forward_done(true);
        Ok((Self(handle), tokio::spawn(connection).abort_handle()))
    }

    /// Sends a question, and returns the answers.
    pub(super) async fn ask(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, flags).await.map(|(answers, _)| answers)
    }

    /// Reads a table, whole and consistent.
    pub(super) async fn dump(
        &self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            let (answers, interrupted) = self.exchange(message.clone(), NLM_F_DUMP).await?;
            if !interrupted {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the table changes faster than it is read"))
    }

    /// The answers, and whether a dump was interrupted by a change of the table.
    async fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut stream = self.0.clone().request(request).map_err(io::Error::other)?;

        let collect = async {
            let (mut answers, mut interrupted) = (Vec::new(), false);
            while let Some(answer) = stream.next().await {
                interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    _ => {}
                }
            }
            Ok((answers, interrupted))
        };
        tokio::time::timeout(ANSWER_TIMEOUT, collect).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, "the kernel's answer did not arrive")
        })?
    }
}

/// A socket for orders.
///
/// The kernel asks for `CAP_NET_ADMIN` when the socket is opened and when an order is sent, so both are done with it in
/// effect; questions have a socket of their own, which never has it.
#[derive(Clone, Debug)]
pub(super) struct Orders(Rtnl);

impl Orders {
    /// Opens the socket; the handle ends the task that serves it.
    pub(super) fn open() -> io::Result<(Self, AbortHandle)> {
        let (mut connection, handle, _) = ORDER.during(rtnetlink::new_connection)?;
        let serve = poll_fn(move |context| {
            let _raised = ORDER.raise();
            connection.poll_unpin(context)
        });
        Ok((Self(Rtnl(handle)), tokio::spawn(serve).abort_handle()))
    }

    /// Sends an order with these flags and waits until the kernel has carried it out.
    pub(super) async fn give(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let done = self.0.exchange(message, flags | NLM_F_ACK).await;
        done.map(drop).map_err(|error| ORDER.explain(error))
    }
}

/// Makes room for `bytes` bytes of messages, also beyond `net.core.rmem_max`.
pub(super) fn force_receive_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    RECEIVE_BUFFER.during(|| Ok(setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &bytes)?))
}
