//! What a server has to read about its client, and what it would read of the segments that it was sent.

use std::net::{IpAddr, SocketAddr};

use super::{
    Told,
    wire::{ACK, RST, SYN, Segment},
};

/// Option of TCP that says who the client is.
const CLIENT: u8 = 254;

/// A connection to a server that is told who the client is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stream {
    /// Number of the first byte that the server takes, by its SYN-ACK.
    first: Option<u32>,
}

impl Stream {
    /// A segment for the server: the bytes that its program reads first must be the true header, and an option must be
    /// the true one.
    pub(crate) fn check(
        &self,
        told: Told,
        client: SocketAddr,
        listener: SocketAddr,
        segment: &Segment,
    ) -> Result<(), String> {
        if told == Told::Option {
            let mut options = options(&segment.options).into_iter();
            let forged = options.find(|it| it[0] == CLIENT && *it != true_option(client));
            return forged.map_or(Ok(()), |option| Err(format!("a forged option, {option:?}")));
        }
        // What a reset carries is not read.
        if segment.flags & RST != 0 || segment.payload.is_empty() {
            return Ok(());
        }
        let is_syn = segment.flags & SYN != 0;
        let begin = segment.seq.wrapping_add(u32::from(is_syn));
        let first = if is_syn { Some(begin) } else { self.first };
        let Some(first) = first else {
            return Err("data before the server has accepted the connection".to_owned());
        };
        let header = true_header(client, listener);
        for (number, byte) in (0..).zip(&segment.payload) {
            let at = begin.wrapping_add(number).wrapping_sub(first) as usize;
            if header.get(at).is_some_and(|right| right != byte) {
                return Err(format!("byte {at} of what the server reads is not the true header's"));
            }
        }
        Ok(())
    }

    /// A segment from the server.
    pub(crate) fn answered(&mut self, segment: &Segment) {
        if segment.flags & (SYN | ACK) == SYN | ACK {
            self.first = Some(segment.ack);
        }
    }
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The PROXY protocol's, version 2.
fn true_header(client: SocketAddr, listener: SocketAddr) -> Vec<u8> {
    let addresses = [bytes(client.ip()), bytes(listener.ip())].concat();
    let family = if client.is_ipv4() { 0x11 } else { 0x21 };
    let len = addresses.len() as u8 + 4;
    let ports = [client.port().to_be_bytes(), listener.port().to_be_bytes()].concat();
    [b"\r\n\r\n\0\r\nQUIT\n", &[0x21, family, 0, len][..], &addresses, &ports].concat()
}

/// The option's kind and length, and the client's port and address.
fn true_option(client: SocketAddr) -> Vec<u8> {
    let address = bytes(client.ip());
    let len = 4 + address.len() as u8;
    [&[CLIENT, len][..], &client.port().to_be_bytes(), &address].concat()
}

/// The options of a segment, up to the first that cannot be read.
fn options(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while let Some(&kind) = bytes.first() {
        let len = match kind {
            0 => break,
            1 => 1,
            _ => bytes.get(1).map_or(0, |&len| usize::from(len)),
        };
        let Some(option) = bytes.get(..len).filter(|_| len > 0) else { break };
        if kind != 1 {
            found.push(option.to_vec());
        }
        bytes = &bytes[len..];
    }
    found
}
