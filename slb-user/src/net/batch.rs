//! Many questions to the kernel at once, from a thread that may wait.
//!
//! A question by [`Rtnl`](super::rtnl::Rtnl) takes several tasks and system calls, which for ten thousand of them takes
//! longer than the kernel takes for the answers.

use std::{
    io,
    os::fd::AsFd as _,
    sync::{Mutex, PoisonError},
};

use nix::sys::{
    socket::{setsockopt, sockopt},
    time::TimeVal,
};
use rtnetlink::{
    packet_core::{NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use tracing::debug;

use super::rtnl::{ANSWER_TIMEOUT, force_receive_buffer};

/// Questions in one datagram. The kernel holds up to a page for each answer.
const AT_ONCE: usize = 64;
/// Room for the answers to one datagram, in bytes.
const RECEIVE_BUFFER: usize = 1 << 20;
/// No answer is larger: the kernel limits netlink messages to 32 KiB.
const LARGEST_MESSAGE: usize = 64 << 10;

/// What the kernel says to a question.
pub(super) type Answer = io::Result<RouteNetlinkMessage>;

/// A socket for questions that have one answer each.
#[derive(Debug)]
pub(super) struct Batch(Mutex<Conversation>);

#[derive(Debug)]
struct Conversation {
    socket: Socket,
    /// Of the last question.
    number: u32,
}

impl Batch {
    /// Opens the socket, in the network namespace of this thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        if let Err(error) = force_receive_buffer(&socket, RECEIVE_BUFFER) {
            debug!(%error, "the netlink socket keeps its default receive buffer");
        }
        let patience = TimeVal::new(ANSWER_TIMEOUT.as_secs() as i64, 0);
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &patience)?;
        Ok(Self(Mutex::new(Conversation { socket, number: 0 })))
    }

    /// The answers to `questions`, in their order. Waits for them.
    ///
    /// # Errors
    ///
    /// The socket fails, or an answer is late or not understood.
    pub(super) fn ask(&self, questions: Vec<RouteNetlinkMessage>) -> io::Result<Vec<Answer>> {
        // What an earlier question has left behind is told by its number.
        let mut conversation = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut answers = Vec::with_capacity(questions.len());
        let mut questions = questions.into_iter();
        while questions.len() > 0 {
            let count = conversation.send(questions.by_ref().take(AT_ONCE))?;
            conversation.receive(count, &mut answers)?;
        }
        Ok(answers)
    }
}

impl Conversation {
    /// Sends questions in one datagram, and says how many.
    fn send(&mut self, questions: impl Iterator<Item = RouteNetlinkMessage>) -> io::Result<u32> {
        let before = self.number;
        let mut datagram = Vec::new();
        for question in questions {
            self.number = self.number.wrapping_add(1);
            let mut message = NetlinkMessage::from(question);
            message.header.flags = NLM_F_REQUEST;
            message.header.sequence_number = self.number;
            message.finalize();
            let begin = datagram.len();
            datagram.resize(begin + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut datagram[begin..]);
        }
        self.socket.send(&datagram, 0)?;
        Ok(self.number.wrapping_sub(before))
    }

    /// Receives the answers to the last `count` questions: the kernel gives them in order.
    fn receive(&self, count: u32, answers: &mut Vec<Answer>) -> io::Result<()> {
        let mut datagram = Vec::with_capacity(LARGEST_MESSAGE);
        let mut left = count;
        while left > 0 {
            datagram.clear();
            self.socket.recv(&mut datagram, 0)?;
            let mut rest = &datagram[..];
            while left > 0 && !rest.is_empty() {
                let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
                let length = NetlinkBuffer::new_checked(rest).map_err(invalid)?.length() as usize;
                let message = NetlinkMessage::deserialize(rest).map_err(invalid)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if message.header.sequence_number != self.number.wrapping_sub(left - 1) {
                    continue;
                }
                left -= 1;
                answers.push(match message.payload {
                    NetlinkPayload::InnerMessage(answer) => Ok(answer),
                    NetlinkPayload::Error(error) => Err(error.to_io()),
                    _ => Err(io::ErrorKind::InvalidData.into()),
                });
            }
        }
        Ok(())
    }
}
