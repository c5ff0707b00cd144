//! Classic BPF programs that let only claims for given addresses through (Documentation/networking/filter.rst).
//!
//! Offsets count from the Ethernet header; the kernel has taken VLAN tags off.

use std::net::{Ipv4Addr, Ipv6Addr};

use socket2::SockFilter;

/// Sender address of ARP.
const ARP_SENDER: u32 = 28;
const NEXT_HEADER: u32 = 20;
const ICMPV6_TYPE: u32 = 54;
/// The last four bytes of the source of IPv6, and of the target of an advertisement.
const SOURCE_TAIL: u32 = 34;
const TARGET_TAIL: u32 = 74;

const ICMPV6: u32 = 58;
const SOLICITATION: u32 = 135;
const ADVERTISEMENT: u32 = 136;

/// The kernel takes 4096 instructions, and an address takes two. Above that, all addresses get through.
const MOST_COMPARED: usize = 2_000;

/// Lets nothing through.
pub(super) fn nothing() -> Vec<SockFilter> {
    vec![verdict(false)]
}

/// ARP whose sender has one of these addresses.
pub(super) fn arp(addresses: &[Ipv4Addr]) -> Vec<SockFilter> {
    let mut program = vec![word(ARP_SENDER)];
    compare(&mut program, addresses.iter().map(|address| address.to_bits()));
    program
}

/// Advertisements about these addresses, and solicitations from them, told by their last four bytes.
pub(super) fn discovery(addresses: &[Ipv6Addr]) -> Vec<SockFilter> {
    let mut program = vec![
        byte(NEXT_HEADER),
        if_equal(ICMPV6, 1, 0),
        verdict(false),
        byte(ICMPV6_TYPE),
        if_equal(ADVERTISEMENT, 4, 0),
        if_equal(SOLICITATION, 1, 0),
        verdict(false),
        word(SOURCE_TAIL),
        skip(1),
        word(TARGET_TAIL),
    ];
    compare(&mut program, addresses.iter().map(|address| address.to_bits() as u32));
    program
}

/// Lets the frame through if the loaded word is one of these.
fn compare(program: &mut Vec<SockFilter>, words: impl ExactSizeIterator<Item = u32>) {
    if words.len() > MOST_COMPARED {
        program.push(verdict(true));
        return;
    }
    program.extend(words.flat_map(|word| [if_equal(word, 0, 1), verdict(true)]));
    program.push(verdict(false));
}

const fn word(offset: u32) -> SockFilter {
    SockFilter::new((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, offset)
}

const fn byte(offset: u32) -> SockFilter {
    SockFilter::new((libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16, 0, 0, offset)
}

/// Goes on so many instructions later.
const fn if_equal(value: u32, then: u8, otherwise: u8) -> SockFilter {
    let code = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    SockFilter::new(code, then, otherwise, value)
}

const fn skip(count: u32) -> SockFilter {
    SockFilter::new((libc::BPF_JMP | libc::BPF_JA) as u16, 0, 0, count)
}

const fn verdict(is_let_through: bool) -> SockFilter {
    let length = if is_let_through { u16::MAX as u32 } else { 0 };
    SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, length)
}
