use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::{
    abi::{Address, TCP},
    parse::fixtures::{Sample, samples},
};

/// What the program does with a frame: `sample` with the words at `at`.
fn told(sample: &Sample, is_header: bool, client: &FlowKey, at: usize) -> Vec<u8> {
    let mut bytes = sample.bytes();
    let mut words = Words::default();
    let len = len(is_header, client.src.is_v4());
    write(&mut words, is_header, client);
    let l4 = sample.expected().l4 as usize;
    let mut frame = Frame::from_slice(&mut bytes);
    let is_v4 = sample.dst.is_ipv4();
    if !is_header {
        return with_options(sample, &words, len);
    }
    account(&mut frame, is_v4, l4, (0, len), words_delta(&words, len), false).unwrap();
    let inserted = words.into_iter().flat_map(u32::to_ne_bytes).take(len as usize);
    bytes.splice(at..at, inserted);
    bytes
}

/// What the program does with the options of a frame; `more` bytes of `words` are the gateway's.
fn with_options(sample: &Sample, words: &Words, more: u32) -> Vec<u8> {
    let mut bytes = sample.bytes();
    let l4 = sample.expected().l4 as usize;
    let len = sample.tcp_options.len();
    let mut options = Options::default();
    options.found[..len].copy_from_slice(&sample.tcp_options);
    let after = make_options(&mut options, len as u32, words, more);
    let delta = options_delta(&options);
    let mut frame = Frame::from_slice(&mut bytes);
    let is_v4 = sample.dst.is_ipv4();
    account(&mut frame, is_v4, l4, (len as u32, after), delta, true).unwrap();
    let made = options.made[..after as usize].to_vec();
    bytes.splice(l4 + 20..l4 + 20 + len, made);
    bytes
}

/// Some options, well-formed or not.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let kinds = prop_oneof![Just(254), Just(34), Just(8), Just(5), Just(30), any::<u8>()];
    let option = (kinds, proptest::collection::vec(any::<u8>(), 0..16), any::<bool>());
    let option = option.prop_map(|(kind, data, is_padding)| match kind {
        _ if is_padding => std::vec![1],
        0 | 1 => std::vec![kind],
        _ => [&[kind, data.len() as u8 + 2], &data[..]].concat(),
    });
    let formed = proptest::collection::vec(option, 0..12).prop_map(|options| options.concat());
    let any = proptest::collection::vec(any::<u8>(), 0..=40);
    prop_oneof![3 => formed, 1 => any].prop_map(|mut options| {
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 0);
        options
    })
}

/// Kind and bytes of each option but padding, as a receiver reads them: up to the first that is malformed.
fn read(mut options: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    while let [kind, rest @ ..] = options {
        match kind {
            0 => break,
            1 => options = rest,
            _ => {
                let Some(len) = rest.first().map(|len| usize::from(*len)) else { break };
                if len < 2 || len > options.len() {
                    break;
                }
                found.push((*kind, options[..len].to_vec()));
                options = &options[len..];
            }
        }
    }
    found
}

fn octets(addr: Address) -> Vec<u8> {
    let at = if addr.is_v4() { 12 } else { 0 };
    addr.bytes[at..].to_vec()
}

proptest! {
    #[test]
    fn given_any_segment_when_a_client_is_told_of_then_it_is_what_a_proxy_would_send(
        sample in samples(),
        client in samples(),
    ) {
        let sample = Sample { proto: TCP, ..sample };
        let key = client.expected().key;
        let is_v4 = key.src.is_v4();

        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
        header.extend(if is_v4 { [0x11, 0, 12] } else { [0x21, 0, 36] });
        header.extend([octets(key.src), octets(key.dst)].concat());
        header.extend([key.sport.to_be_bytes(), key.dport.to_be_bytes()].concat());
        let l4 = sample.expected().l4 as usize;
        let data = l4 + 20 + sample.tcp_options.len();
        let payload = [header, sample.payload.clone()].concat();
        let expected = Sample { payload, ..sample.clone() }.bytes();
        prop_assert_eq!(told(&sample, true, &key, data), expected);

        let mut option = std::vec![254, if is_v4 { 8 } else { 20 }];
        option.extend(key.sport.to_be_bytes());
        option.extend(octets(key.src));
        let sample = Sample { tcp_options: std::vec![1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0], ..sample };
        option.extend(&sample.tcp_options);
        let expected = Sample { tcp_options: option, ..sample.clone() }.bytes();
        prop_assert_eq!(told(&sample, false, &key, l4 + 20), expected);
    }

    #[test]
    fn client_made_option_never_stays_and_ours_is_first(
        sample in samples(),
        client in samples(),
        found in options(),
        is_told in any::<bool>(),
    ) {
        let sample = Sample { proto: TCP, tcp_options: found.clone(), ..sample };
        let key = client.expected().key;
        let mut words = Words::default();
        write(&mut words, false, &key);
        let more = if is_told { len(false, key.src.is_v4()) } else { 0 };
        let bytes = with_options(&sample, &words, more);
        let l4 = sample.expected().l4 as usize;
        let made = &bytes[l4 + 20..l4 + usize::from(bytes[l4 + 12] >> 4) * 4];
        let expected = Sample { tcp_options: made.to_vec(), ..sample.clone() }.bytes();
        prop_assert_eq!(&bytes, &expected, "lengths and checksums are right");

        let ours: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).take(more as usize).collect();
        prop_assert_eq!(&made[..more as usize], &ours[..]);
        let theirs: Vec<_> = read(&found).into_iter().filter(|(kind, _)| !matches!(kind, 254 | 34)).collect();
        let mut kept = read(made);
        if is_told {
            prop_assert_eq!(kept.remove(0), (254, ours));
        }
        prop_assert!(kept.iter().all(|(kind, _)| !matches!(kind, 254 | 34)), "{:?}", made);
        let mut left = theirs.iter();
        prop_assert!(kept.iter().all(|option| left.any(|other| other == option)), "in their order");
        if found.len() + more as usize <= 40 {
            prop_assert_eq!(kept, theirs, "all have room");
        }
    }

    #[test]
    fn urgent_pointer_is_cleared(sample in samples(), pointer in any::<u16>()) {
        let sample = Sample { proto: TCP, ..sample };
        let l4 = sample.expected().l4 as usize;
        let plain = sample.bytes();
        let mut bytes = plain.clone();
        let mut delta = Delta::default();
        let flags = [bytes[l4 + 12], bytes[l4 + 13]];
        let urgent = [flags[0], flags[1] | 0x20];
        delta.replace16(u16::from_ne_bytes(flags), u16::from_ne_bytes(urgent));
        delta.replace16(u16::from_ne_bytes([bytes[l4 + 18], bytes[l4 + 19]]), pointer.to_be());
        bytes[l4 + 12..l4 + 14].copy_from_slice(&urgent);
        bytes[l4 + 18..l4 + 20].copy_from_slice(&pointer.to_be_bytes());
        let checksum = u16::from_ne_bytes([bytes[l4 + 16], bytes[l4 + 17]]);
        bytes[l4 + 16..l4 + 18].copy_from_slice(&delta.apply(checksum).to_ne_bytes());
        clear_urgent(&mut Frame::from_slice(&mut bytes), l4).unwrap();
        let cleared = [flags[0], flags[1] & !0x20];
        prop_assert_eq!(&bytes[l4 + 12..l4 + 14], &cleared[..]);
        prop_assert_eq!(&bytes[l4 + 18..l4 + 20], &[0, 0][..]);
    }

    #[test]
    fn given_a_number_when_it_is_changed_then_the_checksum_stays_right(
        sample in samples(),
        by in any::<u32>(),
        is_sequence in any::<bool>(),
    ) {
        let sample = Sample { proto: TCP, ..sample };
        let l4 = sample.expected().l4 as usize;
        let at = if is_sequence { SEQUENCE } else { ACKNOWLEDGEMENT };
        let before = sample.bytes();
        let mut bytes = before.clone();
        renumber(&mut Frame::from_slice(&mut bytes), l4, at, by).unwrap();
        let number = |bytes: &[u8]| {
            u32::from_be_bytes(bytes[l4 + at..l4 + at + 4].try_into().unwrap())
        };
        prop_assert_eq!(number(&bytes), number(&before).wrapping_add(by));
        renumber(&mut Frame::from_slice(&mut bytes), l4, at, by.wrapping_neg()).unwrap();
        prop_assert_eq!(bytes, before);
    }
}
