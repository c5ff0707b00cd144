//! Attackers: hosts on the clients' side that send what no honest client would, fast.
//!
//! Frames go out through a packet socket, in batches, past the host's own stack. Nothing listens for answers: an
//! attacker with the addresses of others does not see any.

use std::{
    io, mem,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use nix::ifaddrs::getifaddrs;

use crate::{Host, Netns};
use frame::{ACK, FIN, Macs, RST, SYN};

pub mod frame;

/// Frames of one system call.
const BATCH: usize = 64;
/// Two packets of one forged connection are this far apart: far enough that it is no burst.
const APART: u64 = 1;
/// Benchmarking addresses (RFC 2544), of which no host of the lab has one: as many as 17 bits say.
const FORGED: u32 = 0xc612_0000;
const FORGED_BITS: u32 = 17;

/// What is attacked, and what the attacker knows.
#[derive(Clone, Debug)]
pub struct Target {
    /// Destination of honest frames: the gateway's card. Source: the attacker's own.
    pub macs: Macs,
    /// TCP listeners.
    pub tcp: Vec<SocketAddrV4>,
    /// UDP listeners.
    pub udp: Vec<SocketAddrV4>,
    /// Servers behind them.
    pub backends: Vec<SocketAddrV4>,
    /// Connections of honest clients, from the client to the listener.
    pub held: Vec<(SocketAddrV4, SocketAddrV4)>,
}

/// What an attacker sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// SYNs from forged addresses.
    Syns,
    /// SYNs from forged addresses, and a second and two seconds later a segment of the same connection.
    Aged,
    /// Datagrams from forged addresses, two for each port, a second apart.
    Datagrams,
    /// RST, FIN and SYN with guessed numbers, in the name of clients whose addresses and ports are known.
    Ends,
    /// In the name of backends and of routers: SYN-ACKs and data to clients, ICMP errors about held connections.
    Replies,
    /// First fragments of datagrams, from forged addresses.
    Fragments,
    /// SYNs to the backends' own addresses, from forged addresses and from those of held connections.
    Direct,
    /// SYNs, and resets of held connections, in frames to another host's MAC address.
    Foreign,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Syns,
        Self::Aged,
        Self::Datagrams,
        Self::Ends,
        Self::Replies,
        Self::Fragments,
        Self::Direct,
        Self::Foreign,
    ];

    /// The name on the command line, and what is sent.
    #[must_use]
    pub const fn texts(self) -> (&'static str, &'static str) {
        match self {
            Self::Syns => ("syns", "SYNs from forged addresses"),
            Self::Aged => ("aged", "SYNs and two more segments, a second apart"),
            Self::Datagrams => ("datagrams", "datagrams from forged addresses"),
            Self::Ends => ("ends", "RST, FIN and SYN into held connections"),
            Self::Replies => ("replies", "forged replies and ICMP errors"),
            Self::Fragments => ("fragments", "first fragments"),
            Self::Direct => ("direct", "SYNs to the backends themselves"),
            Self::Foreign => ("foreign", "frames to another host's MAC address"),
        }
    }

    /// Writes packet `number` of an attack of `rate` packets per second.
    fn write(self, target: &Target, rate: u64, number: u64, bytes: &mut Vec<u8>) {
        let macs = target.macs;
        let random = mix(number);
        match self {
            Self::Syns => {
                let ends = (forged(random), pick(&target.tcp, number));
                frame::tcp(bytes, macs, ends, (random as u32, 0), SYN, b"");
            }
            Self::Aged => {
                let (connection, step) = in_turn(number, rate, 3);
                let random = mix(connection);
                let ends = (forged(random), pick(&target.tcp, connection));
                let sequence = (random as u32).wrapping_add(step as u32);
                let (flags, payload): (_, &[u8]) = if step == 0 { (SYN, b"") } else { (0, b"x") };
                frame::tcp(bytes, macs, ends, (sequence, 0), flags, payload);
            }
            Self::Datagrams => {
                let (flow, _) = in_turn(number, rate, 2);
                let ends = (forged(mix(flow)), pick(&target.udp, flow));
                frame::udp(bytes, macs, ends, b"forged");
            }
            Self::Ends => {
                let ends = pick(&target.held, number / 4);
                let flags = [RST, RST | ACK, FIN | ACK, SYN][number as usize % 4];
                let numbers = (random as u32, (random >> 32) as u32);
                frame::tcp(bytes, macs, ends, numbers, flags, b"");
            }
            Self::Replies => write_reply(target, number, bytes),
            Self::Fragments => {
                let ends = (forged(random), pick(&target.udp, number));
                frame::first_fragment(bytes, macs, ends, number as u16);
            }
            Self::Direct => {
                let to = pick(&target.backends, number / 2);
                let from = if number.is_multiple_of(2) {
                    forged(random)
                } else {
                    pick(&target.held, number / 2).0
                };
                frame::tcp(bytes, macs, (from, to), (random as u32, 0), SYN, b"");
            }
            Self::Foreign => {
                let macs = Macs { to: [2, 0xde, 0xad, 0, 0, 1], ..macs };
                let (ends, flags) = if number.is_multiple_of(2) {
                    ((forged(random), pick(&target.tcp, number / 2)), SYN)
                } else {
                    (pick(&target.held, number / 2), RST)
                };
                frame::tcp(bytes, macs, ends, (random as u32, 0), flags, b"");
            }
        }
    }
}

/// SYN-ACK, reset and data of a backend to the client of a held connection, and ICMP errors: to the VIP about what it has
/// sent to that client, and to that client about what it has sent to a backend.
fn write_reply(target: &Target, number: u64, bytes: &mut Vec<u8>) {
    /// Port unreachable, fragmentation needed, time exceeded.
    const ERRORS: [[u8; 2]; 3] = [[3, 3], [3, 4], [11, 0]];
    let (client, vip) = pick(&target.held, number / 5);
    let backend = pick(&target.backends, number / 5 / target.held.len() as u64);
    let random = mix(number);
    let numbers = (random as u32, (random >> 32) as u32);
    let error = pick(&ERRORS, random);
    let router = *forged(random).ip();
    let macs = target.macs;
    match number % 5 {
        0 => frame::tcp(bytes, macs, (backend, client), numbers, SYN | ACK, b""),
        1 => frame::tcp(bytes, macs, (backend, client), numbers, RST | ACK, b""),
        2 => frame::tcp(bytes, macs, (backend, client), numbers, ACK, b"forged"),
        3 => frame::icmp_error(bytes, macs, (router, *vip.ip()), error, (vip, client), numbers.0),
        _ => {
            let ends = (router, *client.ip());
            frame::icmp_error(bytes, macs, ends, error, (client, backend), numbers.0);
        }
    }
}

/// Each of `steps` packets of a connection comes [`APART`] seconds after the one before: which connection it is this
/// packet's turn of, and which of its steps. At the beginning they are those of connections that have never begun.
const fn in_turn(number: u64, rate: u64, steps: u64) -> (u64, u64) {
    let step = number % steps;
    ((number / steps).wrapping_sub(step * APART * rate / steps), step)
}

/// An address and port that are not the attacker's.
fn forged(random: u64) -> SocketAddrV4 {
    let address = FORGED | (random >> 16) as u32 & ((1 << FORGED_BITS) - 1);
    SocketAddrV4::new(Ipv4Addr::from_bits(address), random as u16 | 1_024)
}

fn pick<T: Copy>(from: &[T], number: u64) -> T {
    from[(number % from.len() as u64) as usize]
}

/// SplitMix64 (Steele, Lea and Flood, 2014), of a number.
const fn mix(number: u64) -> u64 {
    let z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// An attack that goes on until it is stopped or dropped.
#[derive(Debug)]
pub struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    began: Instant,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Flood {
    /// Sends `rate` packets per second from `host`, or as many as it can.
    ///
    /// # Errors
    ///
    /// The host has no packet socket for its device.
    pub fn start(host: &Host, attack: Attack, target: Target, rate: u32) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&sent));
        let device = device(&host.netns, "eth0")?;
        let thread = host.netns.thread("attacker", move || {
            let mut batch = Batch::open(device.0)?;
            let began = Instant::now();
            let mut number = 0;
            while !stopped.load(Ordering::Relaxed) {
                batch.write(|index, bytes| {
                    attack.write(&target, rate.into(), number + index, bytes);
                });
                counted.fetch_add(batch.send()?, Ordering::Relaxed);
                number += BATCH as u64;
                let due = Duration::from_nanos(number * 1_000_000_000 / u64::from(rate));
                thread::sleep(due.saturating_sub(began.elapsed()));
            }
            Ok(())
        })?;
        Ok(Self { stop, sent, began: Instant::now(), thread: Some(thread) })
    }

    /// Packets per second that were sent so far.
    pub fn rate(&self) -> f64 {
        self.sent.load(Ordering::Relaxed) as f64 / self.began.elapsed().as_secs_f64()
    }

    /// Ends it.
    ///
    /// # Errors
    ///
    /// It had ended before: the device was gone.
    pub fn stop(mut self) -> Result<()> {
        self.finish()
    }

    fn finish(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the attacker panicked"))?
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Index and MAC address of a device.
///
/// # Errors
///
/// There is none of this name.
pub fn device(netns: &Netns, name: &str) -> Result<(i32, [u8; 6])> {
    let found = netns.run(|| {
        let addresses = getifaddrs().context("listing the devices")?;
        let mut links = addresses.filter(|address| address.interface_name == name);
        anyhow::Ok(links.find_map(|link| link.address?.as_link_addr().copied()))
    })??;
    let link = found.with_context(|| format!("no device {name}"))?;
    let mac = link.addr().with_context(|| format!("{name} has no MAC address"))?;
    Ok((i32::try_from(link.ifindex())?, mac))
}

/// Frames that go out by one system call.
struct Batch {
    socket: OwnedFd,
    frames: Vec<Vec<u8>>,
}

impl Batch {
    fn open(device: i32) -> Result<Self> {
        // SAFETY: a plain system call; the descriptor is owned from here on. Protocol 0: it receives nothing.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error()).context("a packet socket");
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: all bytes 0 is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = device;
        let on: libc::c_int = 1;
        // SAFETY: both values outlive the calls and have the lengths that are given.
        let failed = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            ) != 0
                || libc::setsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_PACKET,
                    libc::PACKET_QDISC_BYPASS,
                    (&raw const on).cast(),
                    size_of_val(&on) as u32,
                ) != 0
        };
        if failed {
            return Err(io::Error::last_os_error()).context("binding a packet socket");
        }
        Ok(Self { socket, frames: vec![Vec::new(); BATCH] })
    }

    fn write(&mut self, mut frame: impl FnMut(u64, &mut Vec<u8>)) {
        for (index, bytes) in (0..).zip(&mut self.frames) {
            frame(index, bytes);
        }
    }

    /// Sends all of them; says how many the device has taken. What it has no room for is lost.
    fn send(&mut self) -> Result<u64> {
        let mut parts: Vec<libc::iovec> = self
            .frames
            .iter_mut()
            .map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() })
            .collect();
        let mut messages: Vec<libc::mmsghdr> = parts
            .iter_mut()
            .map(|part| {
                // SAFETY: all bytes 0 is a valid message.
                let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
                message.msg_hdr.msg_iov = part;
                message.msg_hdr.msg_iovlen = 1;
                message
            })
            .collect();
        // SAFETY: the messages, their parts and the frames outlive the call.
        let sent = unsafe {
            libc::sendmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, 0)
        };
        if sent >= 0 {
            return Ok(sent as u64);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOBUFS | libc::EAGAIN) => Ok(0),
            _ => Err(error).context("sending an attack"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_an_attack_in_steps_when_packets_follow_then_each_connection_goes_on_a_second_later() {
        let rate = 3_000;
        let (connection, step) = in_turn(6_000, rate, 3);
        assert_eq!((connection, step), (2_000, 0));
        assert_eq!(in_turn(6_000 + rate + 1, rate, 3), (connection, 1));
        assert_eq!(in_turn(6_000 + 2 * rate + 2, rate, 3), (connection, 2));
    }
}
