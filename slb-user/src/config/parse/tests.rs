//! The files of `tests/configs/`: good ones are read, and mistakes in bad ones are reported at their places.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use proptest::prelude::*;

use super::{load, parse};
use crate::{
    config::{
        Announce, Config, GroupKind, HttpMethod, LoadError, Mistake, ProbeKind, Protocol,
        Scheduler, XdpMode, source::FileSource,
    },
    printable::is_plain,
};

/// The fixtures in `kind`, by name.
fn fixtures(kind: &str) -> Vec<(PathBuf, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/configs").join(kind);
    let entries = fs::read_dir(&directory).unwrap_or_else(|why| panic!("{directory:?}: {why}"));
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read_to_string(&path).unwrap()))
        .collect();
    files.sort();
    files
}

fn good(name: &str) -> (Config, Vec<Mistake>) {
    let (path, text) = fixtures("good").into_iter().find(|(path, _)| path.ends_with(name)).unwrap();
    parse(&path, &text).unwrap_or_else(|report| panic!("{report}"))
}

/// What the comments `# expect LINE: FRAGMENT` announce.
fn expected(text: &str) -> Vec<(usize, &str)> {
    let announced = text.lines().filter_map(|line| line.strip_prefix("# expect "));
    announced
        .map(|announced| {
            let (line, fragment) = announced.split_once(": ").unwrap();
            (line.parse().unwrap(), fragment)
        })
        .collect()
}

fn agree(mistakes: &[Mistake], expected: &[(usize, &str)]) -> bool {
    mistakes.len() == expected.len()
        && mistakes.iter().zip(expected).all(|(found, (line, fragment))| {
            found.line == *line && found.message.contains(fragment)
        })
}

#[test]
fn given_wrong_files_when_parsed_then_exactly_their_mistakes_are_reported() {
    let files = fixtures("wrong");
    assert!(files.len() >= 45, "only {} files", files.len());
    let mut failures = String::new();
    for (path, text) in files {
        let expected = expected(&text);
        assert!(!expected.is_empty(), "{path:?} expects nothing");
        match parse(&path, &text) {
            Ok(_) => failures.push_str(&format!("{path:?} is accepted\n")),
            Err(report) if agree(report.mistakes(), &expected) => {}
            Err(report) => failures.push_str(&format!("{expected:#?}\n{report}\n\n")),
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

#[test]
fn given_wrong_files_when_reported_then_every_line_has_place_and_remedy() {
    for (path, text) in fixtures("wrong") {
        let report = parse(&path, &text).unwrap_err();
        let name = path.display().to_string();
        for (line, mistake) in report.to_string().lines().zip(report.mistakes()) {
            let place = format!("{name}:{}:{}: ", mistake.line, mistake.column);
            assert!(line.starts_with(&place), "{line}");
            assert!(line.contains("; "), "no remedy: {line}");
        }
        assert_eq!(report.to_string().lines().count(), report.mistakes().len(), "{name}");
    }
}

#[test]
fn given_good_files_when_parsed_then_their_warnings_are_those_announced() {
    for (path, text) in fixtures("good") {
        let (_, warnings) = parse(&path, &text).unwrap_or_else(|report| panic!("{report}"));
        assert!(agree(&warnings, &expected(&text)), "{path:?}: {warnings:#?}");
    }
}

#[test]
fn given_the_documented_examples_when_parsed_then_they_are_right() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let text = fs::read_to_string(&page).unwrap();
    let examples: Vec<_> = text.split("```toml\n").skip(1).collect();
    assert!(!examples.is_empty());
    for example in examples {
        let (example, _) = example.split_once("```").unwrap();
        let (_, warnings) = parse(&page, example).unwrap_or_else(|report| panic!("{report}"));
        assert_eq!(warnings, []);
    }
}

#[test]
fn given_a_minimal_file_when_parsed_then_the_defaults_are_filled_in() {
    let (config, _) = good("minimal.toml");

    let gateway = &config.gateway;
    assert_eq!(gateway.interfaces, ["eth0"]);
    assert_eq!((gateway.xdp_mode, gateway.announce), (XdpMode::Auto, Announce::Arp));
    assert_eq!((gateway.flows, &gateway.region), (1_048_576, &None));
    assert_eq!(gateway.api, Path::new("/run/slb/api.sock"));
    assert_eq!(gateway.pins, Path::new("/sys/fs/bpf/slb"));
    let instance = &config.instances[0];
    assert_eq!((instance.groups[0].kind, &instance.groups[0].name), (GroupKind::Default, &None));
    assert_eq!(
        (instance.groups[0].backends[0].weight, instance.groups[0].backends[0].port),
        (100, None)
    );
    let listener = &instance.listeners[0];
    assert_eq!((listener.protocol, listener.port), (Protocol::Tcp, 80));
    assert_eq!((listener.group, listener.backend_port), (0, Some(8080)));
    assert_eq!((listener.scheduler, listener.enabled), (Scheduler::Tch, true));
    assert_eq!(listener.idle_timeout, Duration::from_secs(900));
    let check = listener.health_check.as_ref().unwrap();
    assert_eq!((check.interval, check.timeout), (Duration::from_secs(2), Duration::from_secs(5)));
    assert_eq!((check.healthy, check.unhealthy, check.port), (3, 3, None));
    assert_eq!(check.probe, ProbeKind::Tcp);
}

#[test]
fn given_udp_listeners_when_parsed_then_they_have_the_defaults_of_udp() {
    let (config, _) = good("udp.toml");

    let [plain, payload, http] = config.instances[0].listeners.as_slice() else { panic!() };
    assert_eq!(plain.idle_timeout, Duration::from_secs(90));
    let check = plain.health_check.as_ref().unwrap();
    assert_eq!((check.interval, check.timeout), (Duration::from_secs(5), Duration::from_secs(10)));
    let ProbeKind::Udp(probe) = &check.probe else { panic!() };
    assert_eq!((probe.send.as_str(), &probe.receive), ("", &None));
    let ProbeKind::Udp(probe) = &payload.health_check.as_ref().unwrap().probe else { panic!() };
    assert_eq!((probe.send.as_str(), probe.receive.as_deref()), ("ping", Some("pong")));
    let check = http.health_check.as_ref().unwrap();
    let ProbeKind::Http(probe) = &check.probe else { panic!() };
    assert_eq!(
        (probe.method, probe.path.as_str(), check.port),
        (HttpMethod::Head, "/", Some(8080))
    );
    assert_eq!(probe.expect, [(200, 299), (300, 399)]);
}

#[test]
fn given_every_supported_key_when_parsed_then_all_are_taken_over() {
    let (config, _) = good("full.toml");

    assert_eq!(
        (config.gateway.xdp_mode, config.gateway.announce),
        (XdpMode::Generic, Announce::None)
    );
    let instance = &config.instances[0];
    let kinds: Vec<_> = instance.groups.iter().map(|group| group.kind).collect();
    assert_eq!(kinds, [GroupKind::Default, GroupKind::VServer, GroupKind::PrimarySecondary]);
    let pair: Vec<_> = instance.groups[2].backends.iter().map(|b| b.name.as_str()).collect();
    assert_eq!(pair, ["db-1", "db-2"]);
    let groups: Vec<_> = instance.listeners.iter().map(|listener| listener.group).collect();
    assert_eq!(groups, [0, 1, 2, 2]);
    let check = instance.listeners[0].health_check.as_ref().unwrap();
    let ProbeKind::Http(probe) = &check.probe else { panic!() };
    assert_eq!(probe.expect, [(200, 299), (301, 301), (400, 404)]);
    assert_eq!(probe.host.as_deref(), Some("shop.example"));
    assert_eq!(check.interval, Duration::from_millis(500));
    assert_eq!(instance.listeners[3].health_check, None);
    assert!(!instance.listeners[3].enabled);
}

#[test]
fn given_no_file_when_loaded_then_the_error_says_which_and_why() {
    let error = load(&FileSource::new("/nonexistent/slb.toml")).unwrap_err();

    let message = error.to_string();
    assert!(message.starts_with("cannot read '/nonexistent/slb.toml': No such file"), "{message}");
}

#[test]
fn given_bytes_that_are_not_utf8_when_loaded_then_the_first_is_reported() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), b"[gateway]\nregion = \"\xff\"\n").unwrap();

    let Err(LoadError::Invalid(report)) = load(&FileSource::new(file.path())) else { panic!() };

    let mistake = &report.mistakes()[0];
    assert_eq!((mistake.line, mistake.column), (2, 11));
    assert!(mistake.message.contains("0xff"), "{mistake}");
}

#[test]
fn given_a_character_of_several_bytes_when_reported_then_columns_count_characters() {
    let report = parse(Path::new("f"), "\"äö\" = 1 # no such key\nx = [\"é\", 08]\n").unwrap_err();

    let place = |mistake: &Mistake| (mistake.line, mistake.column);
    let places: Vec<_> = report.mistakes().iter().map(place).collect();
    assert!(places.contains(&(1, 1)) && places.contains(&(2, 11)), "{report}");
}

#[test]
fn given_51_listeners_when_parsed_then_the_last_is_one_too_many() {
    let (path, text) =
        fixtures("good").into_iter().find(|(p, _)| p.ends_with("minimal.toml")).unwrap();
    let listener = |port| {
        format!("\n[[instance.listener]]\nprotocol = \"tcp\"\nport = {port}\nbackend_port = 1\n")
    };
    let fifty = text + &(1001..1050).map(listener).collect::<String>();
    assert!(parse(&path, &fifty).is_ok());

    let report = parse(&path, &(fifty.clone() + &listener(2000))).unwrap_err();

    assert_eq!(report.mistakes().len(), 1, "{report}");
    assert_eq!(report.mistakes()[0].line, fifty.lines().count() + 2, "{report}");
    assert!(report.to_string().contains("write at most 50"), "{report}");
}

/// A good file with a piece cut out, and other text put in.
fn mutated() -> impl Strategy<Value = String> {
    let texts: Vec<String> = fixtures("good").into_iter().map(|(_, text)| text).collect();
    let pieces = prop_oneof![
        any::<String>(),
        "[\\[\\]{}=\"'.,# \n0-9a-z]{0,12}",
        proptest::sample::select(vec![
            "[[instance]]\n",
            "[gateway]\n",
            "port = 0x_\n",
            "\"\"\"",
            "[["
        ])
        .prop_map(str::to_owned),
    ];
    (
        proptest::sample::select(texts),
        prop::collection::vec((any::<prop::sample::Index>(), 0_usize..40, pieces), 1..6),
    )
        .prop_map(|(mut text, edits)| {
            for (at, cut, piece) in edits {
                let start = text.floor_char_boundary(at.index(text.len() + 1));
                let end = text.ceil_char_boundary((start + cut).min(text.len()));
                text.replace_range(start..end, &piece);
            }
            text
        })
}

/// Any text is read, or refused with mistakes whose places are in the text.
fn is_judged(text: &str) -> Result<(), TestCaseError> {
    if let Err(report) = parse(Path::new("f"), text) {
        prop_assert!(!report.mistakes().is_empty());
        let lines = text.split('\n').count();
        for mistake in report.mistakes() {
            prop_assert!((1..=lines).contains(&mistake.line));
            prop_assert!(!mistake.message.contains('\n'), "{}", mistake.message);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn given_any_text_when_parsed_then_it_is_judged(text in any::<String>()) {
        is_judged(&text)?;
    }

    #[test]
    fn given_a_damaged_file_when_parsed_then_it_is_judged(text in mutated()) {
        is_judged(&text)?;
    }
}

#[test]
fn given_any_file_when_asked_for_the_socket_then_it_is_known() {
    let cases = [
        ("[gateway]\napi = \"/run/a.sock\"\n", "/run/a.sock"),
        ("[gateway]\napi = \"/run/a.sock\"\nflows = \"many\"\n[[nonsense\n", "/run/a.sock"),
        ("[gateway]\n", "/run/slb/api.sock"),
        ("api = [", "/run/slb/api.sock"),
        ("gateway = 7", "/run/slb/api.sock"),
        ("", "/run/slb/api.sock"),
    ];
    for (text, expected) in cases {
        assert_eq!(super::api(text), Path::new(expected), "{text}");
    }
}

#[test]
fn report_of_very_many_mistakes_has_the_first_hundred_and_a_count() {
    let many = |line: &dyn Fn(usize) -> String| (0..30_000).map(line).collect::<String>();
    let texts = [
        ("unknown keys", many(&|i| format!("x{i} = 1\n"))),
        ("bad values", many(&|i| format!("x{i} = nope\n"))),
        ("arrays", many(&|i| format!("x{i} = [1, 2]\n"))),
        ("bad values on one line", format!("x = [{}]\n", "nope, ".repeat(30_000))),
        ("no TOML", many(&|i| format!("this is wrong {i}\n"))),
        ("names", many(&|_| "[[instance]]\nname = \"a\"\n".to_owned())),
    ];
    for (what, text) in texts {
        let begin = std::time::Instant::now();
        let report = parse(Path::new("f"), &text).unwrap_err();
        // Ten times more than it takes, and less than what grows with the square of the file does.
        assert!(
            begin.elapsed() < std::time::Duration::from_secs(15),
            "{what}: {:?}",
            begin.elapsed()
        );
        assert!(report.mistakes().len() <= 100, "{what}");
        assert!(report.mistakes().is_sorted_by_key(|mistake| (mistake.line, mistake.column)));
        let (shown, text) = (report.mistakes().len(), report.to_string());
        let is_cut = text.ends_with(&format!("\n... and {} more", report.count() - shown));
        assert_eq!(is_cut, report.count() > shown, "{what}");
        assert!(text.len() < 100_000, "{what}");
    }
}

#[test]
fn quoted_text_is_harmless_and_short() {
    let quoted = |text: &str| parse(Path::new("f"), text).unwrap_err().to_string();
    let report = quoted("[gateway]\nflows = 2_0\u{1b}48\nregion = \"a \u{202e}b\"\n");
    assert!(report.contains("\\u{1b}48") && report.contains("\\u{202e}"), "{report}");
    assert!(!report.contains(['\u{1b}', '\u{202e}']), "{report}");
    let long = quoted(&format!("x = {}\n", "[".repeat(100_000)));
    assert!(long.len() < 5_000, "{}", long.len());
}

#[test]
fn names_are_visible_text() {
    let text = |name: &str| format!("[gateway]\nregion = \"{name}\"\ninterfaces = [\"{name}\"]\n");
    for name in ["a\u{202e}b", "a\u{200b}", "\u{2066}a", "a\u{9b}b", "a\\u007f", "a\\u001bb"] {
        let report = parse(Path::new("f"), &text(name)).unwrap_err().to_string();
        assert!(report.contains("'region' is ") && report.contains("'interfaces' is "), "{report}");
        assert!(report.chars().all(|c| c == '\n' || is_plain(c)), "{report:?}");
    }
    let report = parse(Path::new("f"), &text("käse-日")).unwrap_err().to_string();
    assert!(!report.contains("region"), "{report}");
}
