//! Lowers what a TCP SYN offers to take, so that segments fit a way that is narrower than either end's.

use core::{hint::black_box, mem::offset_of};

use network_types::tcp::TcpHdr;

use crate::{
    abi::TCP,
    checksum::Delta,
    frame::Frame,
    parse::{Packet, TcpFlags},
};

/// Kinds of options (RFC 9293, section 3.2).
const END: u8 = 0;
const NO_OPERATION: u8 = 1;
const MSS: u8 = 2;
/// Length of the MSS option.
const MSS_LEN: usize = 4;

/// Lowers the maximum segment size that `packet` states to `max`, if it is a SYN and states a larger one.
#[inline(always)]
pub fn clamp(frame: &mut Frame<'_>, packet: &Packet, max: u16) {
    if packet.key.proto == TCP && packet.flags.intersects(TcpFlags::SYN) {
        let _ = change(frame, packet.l4 as usize, |stated| stated.min(max));
    }
}

/// Lowers the maximum segment size that a SYN states by `less`; its TCP header is at `l4`.
#[inline(always)]
pub fn lower(frame: &mut Frame<'_>, l4: usize, less: u16) {
    let _ = change(frame, l4, |stated| stated.saturating_sub(less));
}

#[inline(always)]
fn change(frame: &mut Frame<'_>, l4: usize, to: impl Fn(u16) -> u16) -> Option<()> {
    let end = usize::from(frame.header::<{ TcpHdr::LEN }>(l4)?.get::<u8>(12) >> 4) * 4;
    let mut at = TcpHdr::LEN;
    // 40 bytes of options.
    for _ in 0..40 {
        if at + MSS_LEN > end {
            return None;
        }
        let option = frame.header::<MSS_LEN>(l4 + at)?;
        let (kind, len) = (option.get::<u8>(0), usize::from(option.get::<u8>(1)));
        let step = match kind {
            END => return None,
            NO_OPERATION => 1,
            MSS if len == MSS_LEN => return write(frame, l4, at, to),
            _ if len < 2 => return None,
            _ => len,
        };
        // Changes nothing, as the sum fits. But it makes the verifier forget the ways to get here, each
        // of which it would follow on by itself; the compiler would leave it out.
        at = black_box(at + step) & 0x1ff;
    }
    None
}

#[inline(always)]
fn write(frame: &mut Frame<'_>, l4: usize, at: usize, to: impl Fn(u16) -> u16) -> Option<()> {
    let mut option = frame.header_mut::<MSS_LEN>(l4 + at)?;
    let stated = option.get_be16(2);
    let written = to(stated);
    if stated == written {
        return None;
    }
    option.set(2, written.to_be());
    let mut delta = Delta::default();
    if at.is_multiple_of(2) {
        delta.replace16(stated.to_be(), written.to_be());
    } else {
        // It is the halves of two words, then: their sum is that of the swapped bytes.
        delta.replace16(stated.to_le(), written.to_le());
    }
    let mut tcp = frame.header_mut::<{ TcpHdr::LEN }>(l4)?;
    let checksum = tcp.get(offset_of!(TcpHdr, check));
    tcp.set(offset_of!(TcpHdr, check), delta.apply(checksum));
    Some(())
}

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use etherparse::{TcpHeader, TcpOptionElement, TcpOptionsIterator};
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::parse::{
        self,
        fixtures::{Sample, samples},
    };

    const SYN: u8 = TcpFlags::SYN.bits();

    /// Options, the place of a MSS option in them, and its value.
    fn options() -> impl Strategy<Value = (Vec<u8>, Option<usize>)> {
        let other = prop_oneof![
            Just(vec![NO_OPERATION]),
            any::<u8>().prop_map(|shift| vec![3, 3, shift]),
            Just(vec![4, 2]),
            any::<[u8; 8]>().prop_map(|stamps| [&[8, 10], &stamps[..]].concat()),
            vec(any::<u8>(), 0..12)
                .prop_map(|data| { [&[254, 2 + data.len() as u8], &data[..]].concat() }),
        ];
        (vec(other, 0..40), any::<u16>(), 0..20_usize).prop_map(|(others, mss, before)| {
            let mut options = Vec::new();
            let mut place = None;
            for (turn, other) in others.into_iter().enumerate() {
                if turn == before && options.len() + 4 <= 40 {
                    place = Some(options.len());
                    options.extend([MSS, 4]);
                    options.extend(mss.to_be_bytes());
                }
                if options.len() + other.len() <= 40 {
                    options.extend(other);
                }
            }
            options.resize(options.len().next_multiple_of(4), END);
            (options, place)
        })
    }

    fn clamped(bytes: &[u8], max: u16) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        let mut packet = Packet::default();
        parse::packet(&Frame::from_slice(&mut bytes), &mut packet).unwrap();
        clamp(&mut Frame::from_slice(&mut bytes), &packet, max);
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn given_any_segment_when_clamped_then_it_is_what_a_sender_of_smaller_segments_would_send(
            sample in samples(),
            (options, place) in options(),
            max in any::<u16>(),
            is_syn in any::<bool>(),
        ) {
            let flags = if is_syn { sample.flags | SYN } else { sample.flags & !SYN };
            let sample = Sample { proto: TCP, tcp_options: options, flags, ..sample };
            let mut smaller = sample.clone();
            if let (Some(at), true) = (place, is_syn) {
                let mss = &mut smaller.tcp_options[at + 2..at + 4];
                let stated = u16::from_be_bytes([mss[0], mss[1]]);
                mss.copy_from_slice(&stated.min(max).to_be_bytes());
            }
            prop_assert_eq!(clamped(&sample.bytes(), max), smaller.bytes());
        }

        #[test]
        fn given_any_options_when_clamped_then_no_larger_size_is_read_than_the_other_end_may_send(
            sample in samples(),
            options in vec(any::<[u8; 4]>(), 0..=10),
            max in any::<u16>(),
        ) {
            let options = options.concat();
            let sample = Sample { proto: TCP, flags: SYN, tcp_options: options, ..sample };
            let after = clamped(&sample.bytes(), max);
            let (tcp, _) = TcpHeader::from_slice(&after[sample.expected().l4 as usize..]).unwrap();
            let stated = TcpOptionsIterator::from_slice(&tcp.options)
                .map_while(Result::ok)
                .find_map(|option| match option {
                    TcpOptionElement::MaximumSegmentSize(size) => Some(size),
                    _ => None,
                });
            // The other implementation stops at some options whose length is not that of their kind.
            prop_assert!(stated.is_none_or(|size| size <= max), "{stated:?}");
        }

        #[test]
        fn given_a_frame_that_has_become_shorter_when_clamped_then_nothing_is_written_past_its_end(
            (options, _) in options(),
            len in 0..120_usize,
        ) {
            let sample = Sample { tcp_options: options, ..Sample::default() };
            let whole = sample.bytes();
            let len = len.min(whole.len());
            let mut bytes = whole.clone();
            clamp(&mut Frame::from_slice(&mut bytes[..len]), &sample.expected(), 0);
            prop_assert_eq!(&bytes[len..], &whole[len..]);
        }
    }
}
