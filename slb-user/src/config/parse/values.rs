//! The types of single values: what is accepted, and what to write instead.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use humantime::format_duration;
use ipnet::IpNet;
use toml::de::DeValue;

use super::read::{Wrong, list};
use crate::{printable::is_plain, seed::SharedSeed};

type Read<T> = Result<T, Wrong>;

pub(super) fn boolean(value: &DeValue<'_>) -> Read<bool> {
    value.as_bool().ok_or_else(|| Wrong::write("true or false"))
}

/// Text that satisfies `accepts`.
fn text(value: &DeValue<'_>, write: &str, accepts: impl Fn(&str) -> bool) -> Read<String> {
    match value.as_str() {
        Some(text) if accepts(text) => Ok(text.to_owned()),
        _ => Err(Wrong::write(write)),
    }
}

/// The name of something in this file.
pub(super) fn name(value: &DeValue<'_>) -> Read<String> {
    const LONGEST: usize = 63;
    // Names are metric labels and arguments of commands, where '/' separates them.
    text(value, "1 to 63 bytes of visible text without spaces and '/'", |name| {
        (1..=LONGEST).contains(&name.len())
            && !name.contains(|c: char| c == '/' || c.is_whitespace() || !is_plain(c))
    })
}

/// A secret that gateways share.
pub(super) fn seed(value: &DeValue<'_>) -> Read<SharedSeed> {
    // Not to be guessed.
    const LENGTHS: RangeInclusive<usize> = 16..=128;
    let write = "16 to 128 bytes of visible text, such as what `openssl rand -hex 16` prints";
    let text =
        text(value, write, |text| LENGTHS.contains(&text.len()) && text.chars().all(is_plain));
    text.map(|text| SharedSeed::of(&text))
}

/// The name of a network interface.
pub(super) fn interface(value: &DeValue<'_>) -> Read<String> {
    // The kernel's rules: IFNAMSIZ with its NUL, and dev_valid_name(). Invisible characters it allows, which are not meant.
    text(value, "the name of a network interface (1 to 15 bytes), such as \"eth0\"", |name| {
        (1..libc::IFNAMSIZ).contains(&name.len())
            && !matches!(name, "." | "..")
            && !name.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace() || !is_plain(c))
    })
}

/// An absolute path of at most `longest` bytes.
pub(super) fn absolute_path(
    longest: usize,
    example: &str,
) -> impl Fn(&DeValue<'_>) -> Read<PathBuf> {
    move |value| {
        let write = format!("an absolute path of at most {longest} bytes, such as {example:?}");
        text(value, &write, |path| {
            path.starts_with('/') && path.len() <= longest && path.chars().all(is_plain)
        })
        .map(PathBuf::from)
    }
}

/// A directory on bpffs, which allows no dots in names; where it is mounted may have some.
pub(super) fn pins(longest: usize, example: &str) -> impl Fn(&DeValue<'_>) -> Read<PathBuf> {
    let any = absolute_path(longest, example);
    move |value| {
        let path = any(value)?;
        let inside = path.strip_prefix("/sys/fs/bpf").ok().and_then(|inside| inside.to_str());
        if inside.is_some_and(|inside| inside.contains('.')) {
            return Err(Wrong::write(
                "a path without '.' below /sys/fs/bpf, where the kernel allows none",
            ));
        }
        Ok(path)
    }
}

/// A whole number within `range`.
pub(super) fn integer<T>(range: RangeInclusive<T>) -> impl Fn(&DeValue<'_>) -> Read<T>
where
    T: TryFrom<i128> + PartialOrd + std::fmt::Display,
{
    move |value| {
        value
            .as_integer()
            .and_then(|number| i128::from_str_radix(number.as_str(), number.radix()).ok())
            .and_then(|number| T::try_from(number).ok())
            .filter(|number| range.contains(number))
            .ok_or_else(|| {
                Wrong::write(format!("a whole number from {} to {}", range.start(), range.end()))
            })
    }
}

/// A TCP or UDP port.
pub(super) fn port(value: &DeValue<'_>) -> Read<u16> {
    integer(1..=u16::MAX)(value)
}

/// An address and port to listen on, or nothing.
pub(super) fn http(value: &DeValue<'_>) -> Read<Option<SocketAddr>> {
    const WRITE: &str =
        "an address and port, such as \"127.0.0.1:9470\" or \"[::1]:9470\", or \"off\"";
    let text = value.as_str().ok_or_else(|| Wrong::write(WRITE))?;
    if text == "off" {
        return Ok(None);
    }
    let addr: SocketAddr = text.parse().map_err(|_| Wrong::write(WRITE))?;
    if addr.port() == 0 { Err(Wrong::write(WRITE)) } else { Ok(Some(addr)) }
}

/// A duration within `range`.
pub(super) fn duration(range: RangeInclusive<Duration>) -> impl Fn(&DeValue<'_>) -> Read<Duration> {
    move |value| {
        any_duration(value).filter(|duration| range.contains(duration)).ok_or_else(|| {
            let (least, most) = (format_duration(*range.start()), format_duration(*range.end()));
            Wrong::write(format!("a duration from \"{least}\" to \"{most}\""))
        })
    }
}

fn any_duration(value: &DeValue<'_>) -> Option<Duration> {
    // Longer text adds nothing, and its sums can come close enough to the limit to panic.
    const LONGEST: usize = 16;
    let text = value.as_str().filter(|text| text.len() <= LONGEST)?;
    humantime::parse_duration(text).ok()
}

/// A duration within `range`, or `off`.
pub(super) fn duration_or_off(
    off: &'static str,
    range: RangeInclusive<Duration>,
) -> impl Fn(&DeValue<'_>) -> Read<Option<Duration>> {
    let within = duration(range);
    move |value| {
        let is_off = value.as_str() == Some(off) || any_duration(value) == Some(Duration::ZERO);
        if is_off {
            return Ok(None);
        }
        within(value).map(Some).map_err(|Wrong { aside, write }| Wrong {
            aside,
            write: format!("{write}, or \"{off}\""),
        })
    }
}

/// Bits per second, in the words of `tc`.
pub(super) fn bandwidth(value: &DeValue<'_>) -> Read<u64> {
    const UNITS: [(&str, u64); 4] =
        [("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000), ("bit", 1)];
    const RANGE: RangeInclusive<u64> = 8_000..=1_000_000_000_000;
    let read = |text: &str| {
        let (number, unit) =
            UNITS.iter().find_map(|(word, unit)| Some((text.strip_suffix(word)?, unit)))?;
        number.parse::<u64>().ok()?.checked_mul(*unit).filter(|bits| RANGE.contains(bits))
    };
    value.as_str().and_then(read).ok_or_else(|| {
        Wrong::write("bits per second from \"8kbit\" to \"1000gbit\", such as \"100mbit\"")
    })
}

/// A network, or one address.
pub(super) fn network(value: &DeValue<'_>) -> Read<IpNet> {
    const WRITE: &str = "a network, such as \"198.51.100.0/24\", or an address";
    let text = value.as_str().ok_or_else(|| Wrong::write(WRITE))?;
    let network = text
        .parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| Wrong::write(WRITE))?;
    if network.addr().to_canonical() != network.addr() {
        return Err(Wrong::because("which is IPv4 in the form of IPv6", "it as IPv4"));
    }
    if network.trunc() != network {
        return Err(Wrong::because(
            "which has bits behind its prefix",
            format!("\"{}\", or \"{}\"", network.trunc(), network.addr()),
        ));
    }
    Ok(network)
}

/// One of `words`.
pub(super) fn choice<T: Copy>(
    words: &'static [(&'static str, T)],
) -> impl Fn(&DeValue<'_>) -> Read<T> {
    move |value| {
        let word = value.as_str();
        if let Some(&(_, found)) = words.iter().find(|(known, _)| word == Some(known)) {
            return Ok(found);
        }
        let words: Vec<_> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        Err(Wrong::write(list(&words)))
    }
}

/// An address that one host can have, and that needs no interface to be complete.
pub(super) fn unicast(value: &DeValue<'_>) -> Read<IpAddr> {
    let address = value
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Wrong::write("an IPv4 or IPv6 address, such as \"192.0.2.10\""))?;
    match not_unicast(address) {
        None => Ok(address),
        Some(Unfit { aside, write }) => Err(Wrong::because(aside, write)),
    }
}

struct Unfit {
    aside: &'static str,
    write: String,
}

fn not_unicast(address: IpAddr) -> Option<Unfit> {
    let aside = match address {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => "an unspecified address",
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => "the unspecified address",
        IpAddr::V4(Ipv4Addr::BROADCAST) => "the broadcast address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        _ if address.is_loopback() => "a loopback address",
        _ if address.is_multicast() => "a multicast address",
        IpAddr::V6(v6) => {
            let v4 = v6.to_ipv4_mapped()?;
            return Some(Unfit {
                aside: "an IPv4 address in IPv6 form",
                write: format!("\"{v4}\""),
            });
        }
        IpAddr::V4(_) => return None,
    };
    Some(Unfit { aside, write: "a unicast address that other hosts can reach".to_owned() })
}

/// The target of an HTTP request in origin form (RFC 9112, section 3.2.1).
pub(super) fn http_path(value: &DeValue<'_>) -> Read<String> {
    text(value, "a path that begins with '/', with other than plain ASCII as %XX", |path| {
        path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic() && b != b'#')
    })
}

/// What the outer sources of tunnels begin with: 16 bits of IPv4, or 64 of IPv6.
pub(super) fn tunnel_source(value: &DeValue<'_>) -> Read<IpAddr> {
    let prefix = value.as_str().and_then(|text| text.split_once('/'));
    let prefix = prefix.and_then(|(addr, len)| match (addr.parse().ok()?, len) {
        (IpAddr::V4(addr), "16") if addr.to_bits().trailing_zeros() >= 16 => Some(addr.into()),
        (IpAddr::V6(addr), "64") if addr.to_bits() as u64 == 0 => Some(addr.into()),
        _ => None,
    });
    prefix.filter(|&addr| not_unicast(addr).is_none()).ok_or_else(|| {
        Wrong::write("an IPv4 prefix of 16 bits or an IPv6 one of 64, such as \"172.16.0.0/16\"")
    })
}

/// The value of a `Host` header.
pub(super) fn http_host(value: &DeValue<'_>) -> Read<String> {
    text(value, "a host name, with \":port\" if needed, such as \"shop.example\"", |host| {
        !host.is_empty()
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~:[]%".contains(&b))
    })
}

/// HTTP statuses: `"2xx"`, `"204"` or `"200-204"`, as an inclusive range.
pub(super) fn statuses(value: &DeValue<'_>) -> Read<(u16, u16)> {
    const VALID: RangeInclusive<u16> = 100..=599;
    // `u16::from_str` takes a sign and leading zeros, which no status has.
    let status = |text: &str| {
        let digits = text.len() == 3 && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    let range = value.as_str().and_then(|text| {
        if let Some(class) = text.strip_suffix("xx") {
            let first = status(&format!("{class}00"))?;
            return Some((first, first + 99));
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some((status(first)?, status(last)?))
    });
    range
        .filter(|(first, last)| first <= last && VALID.contains(first) && VALID.contains(last))
        .ok_or_else(|| Wrong::write("statuses from 100 to 599 as \"2xx\", \"204\" or \"200-204\""))
}

/// What a UDP probe sends or awaits: at least `shortest` bytes.
pub(super) fn payload(shortest: usize) -> impl Fn(&DeValue<'_>) -> Read<String> {
    // Fits the smallest MTU that IPv6 allows.
    const LONGEST: usize = 1232;
    move |value| {
        text(value, &format!("text of {shortest} to {LONGEST} bytes"), |payload| {
            (shortest..=LONGEST).contains(&payload.len())
        })
    }
}
