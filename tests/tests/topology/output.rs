//! The agent and its commands, when their output is not read or cannot be written, and when clients and files hang.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead as _, BufReader, PipeReader, PipeWriter, Write as _, pipe},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::AsFd as _,
        unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
        stat::Mode,
    },
    unistd::mkfifo,
};
use serde_json::Value;

use crate::support::{
    Lab, NOTICED, output,
    plan::{self, vips},
    wait_until,
};

/// Of the weighted group.
const DEAD: &str = "web-3";
const METRICS: &str = "http://127.0.0.1:9470/metrics";
/// What a shell calls the end by SIGPIPE.
const CLOSED_PIPE: i32 = 141;

/// A backend stops; it gets no new connections after that.
fn fails_over(lab: &mut Lab) {
    lab.server(DEAD, plan::WEB).stop();
    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "unhealthy");
    for to in vips(plan::WEB_PORT) {
        let outcome = lab.client.http(to, 60, 4).unwrap();
        assert_eq!((outcome.ok(), outcome.failed()), (60, 0), "{to}: {outcome}");
        assert!(!outcome.per_backend.contains_key(DEAD), "{to}: {outcome}");
    }
}

fn returns(lab: &mut Lab) {
    lab.server(DEAD, plan::WEB).restart().unwrap();
    lab.wait_health("tcp", plan::WEB_PORT, DEAD, "healthy");
}

fn socket(lab: &Lab) -> PathBuf {
    lab.gateway.config().with_file_name("api.sock")
}

/// Has the agent refuse a file `count` times; each time is a line of its log.
fn refuse(lab: &Lab, count: usize) {
    let good = fs::read_to_string(lab.gateway.config()).unwrap();
    fs::write(lab.gateway.config(), "wrong").unwrap();
    let url = format!("http://slb/v1/reload?[1-{count}]");
    let socket = socket(lab);
    let args = ["--silent", "--request", "POST", "--unix-socket", socket.to_str().unwrap(), &url];
    output(&lab.topology.gateway, "curl", &args);
    fs::write(lab.gateway.config(), good).unwrap();
}

fn dropped(status: &Value) -> u64 {
    status["log_lines_dropped"].as_u64().unwrap()
}

/// A pipe of the smallest size.
fn small_pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = pipe().unwrap();
    nix::fcntl::fcntl(writer.as_fd(), nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    (reader, writer)
}

/// More than the lines that wait for a reader.
const MANY: usize = 1_500;

#[test]
#[ignore = "needs root"]
fn agent_fails_over_and_ends_when_its_log_cannot_be_written() {
    let mut lab = Lab::prepare();
    let mut kept = None;
    for case in ["closed", "full", "reader gone", "stalled"] {
        let mut reader = None;
        let start = lab.gateway.start_with(|command| match case {
            "closed" => {
                let close = || {
                    // SAFETY: plain system calls; nothing of this process uses them after this.
                    unsafe { (libc::close(1), libc::close(2)) };
                    Ok(())
                };
                // SAFETY: the closure makes async-signal-safe calls only.
                unsafe { command.pre_exec(close) };
            }
            "full" => {
                command.stdout(full()).stderr(full());
            }
            _ => {
                let (read, write) = small_pipe();
                reader = Some(read);
                command.stdout(write.try_clone().unwrap()).stderr(write);
            }
        });
        start.unwrap_or_else(|error| panic!("{case}: {error:#}"));
        lab.wait_all_healthy();
        match case {
            "reader gone" => drop(reader),
            "stalled" => {
                kept = reader;
                refuse(&lab, MANY);
                assert!(dropped(&lab.gateway.status().unwrap()) > 0);
            }
            _ => {}
        }
        fails_over(&mut lab);
        let status = lab.gateway.status().unwrap();
        assert_eq!(dropped(&status) > 0, case != "closed", "{case}: {status:#}");
        lab.gateway.terminate().unwrap_or_else(|error| panic!("{case}: {error:#}"));
        lab.server(DEAD, plan::WEB).restart().unwrap();
    }
    drop(kept);
}

#[test]
#[ignore = "needs root"]
fn dropped_log_lines_are_counted_and_reported_when_the_reader_is_back() {
    let mut lab = Lab::prepare();
    let (reader, writer) = small_pipe();
    let prepare = |command: &mut Command| {
        command.stderr(writer).stdout(Stdio::null());
    };
    lab.gateway.start_with(prepare).unwrap();
    refuse(&lab, MANY);
    let lost = dropped(&lab.gateway.status().unwrap());
    assert!(lost > 0);
    let metrics = output(&lab.topology.gateway, "curl", &["--silent", "--fail", METRICS]);
    assert!(metrics.contains(&format!("\nslb_log_lines_dropped_total {lost}\n")), "{metrics}");

    let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
    // More may be lost until the lines are read.
    let said = lines.find(|line| line.contains("log lines were dropped")).unwrap();
    let (_, said) = said.rsplit_once("dropped=").unwrap();
    let said: u64 = said.parse().unwrap();
    assert!(said >= lost, "{said} of {lost}");
    // And it goes on as before.
    lab.gateway.signal(Signal::SIGHUP).unwrap();
    assert!(lines.any(|line| line.contains("reloaded")));
    assert!(dropped(&lab.gateway.status().unwrap()) >= said);
}

/// Lowers the limit of open files of a process that is about to start.
fn limit_files(command: &mut Command, files: u64) {
    let limit = move || Ok(setrlimit(Resource::RLIMIT_NOFILE, files, files)?);
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(limit) };
}

/// Connections to the metrics, each with the beginning of a request.
fn half_open(lab: &Lab, count: usize, text: &str) -> Vec<TcpStream> {
    let connect = || {
        let connect = |_| {
            let mut stream = TcpStream::connect("127.0.0.1:9470").unwrap();
            // The agent may have closed it by now.
            let _ = stream.write_all(text.as_bytes());
            stream
        };
        (0..count).map(connect).collect()
    };
    lab.topology.gateway.run(connect).unwrap()
}

fn scrape(lab: &Lab) {
    let args = ["--silent", "--show-error", "--fail", "--max-time", "10", METRICS];
    assert!(output(&lab.topology.gateway, "curl", &args).contains("slb_build_info"));
}

#[test]
#[ignore = "needs root"]
fn idle_connections_leave_descriptors_to_probes() {
    let mut lab = Lab::prepare();
    let prepare = |command: &mut Command| {
        limit_files(command.stdout(Stdio::null()).stderr(Stdio::null()), 130);
    };
    lab.gateway.start_with(prepare).unwrap();
    lab.wait_all_healthy();
    let idle = half_open(&lab, 80, "");
    fails_over(&mut lab);
    scrape(&lab);
    returns(&mut lab);
    drop(idle);
}

#[test]
#[ignore = "needs root"]
fn half_open_requests_take_few_descriptors_and_delay_nothing() {
    const COUNT: usize = 4_000;
    let mut lab = Lab::start();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let open = Path::new("/proc").join(lab.gateway.pid().unwrap().to_string()).join("fd");
    let before = fs::read_dir(&open).unwrap().count();
    let requests = half_open(&lab, COUNT, "GET /metrics HTTP/1.1\r\nHost: ");
    fails_over(&mut lab);
    scrape(&lab);
    let more = fs::read_dir(&open).unwrap().count().saturating_sub(before);
    assert!(more < COUNT / 10, "{more} more descriptors");
    drop(requests);
}

#[test]
#[ignore = "needs root"]
fn shortage_of_local_ports_is_a_problem_and_no_backend_is_blamed() {
    const PORT: u16 = 40_000;
    let lab = Lab::start();
    let gateway = &lab.topology.gateway;
    gateway.sysctl("ipv4/ip_local_port_range", &format!("{PORT} {PORT}")).unwrap();
    // Both families: Rust binds `::` for either. A probe may have the port until it is done.
    let any = (std::net::Ipv6Addr::UNSPECIFIED, PORT);
    let mut taken = (None, None);
    wait_until("the only port is taken", || {
        let bind = || {
            taken.0 = taken.0.take().or_else(|| TcpListener::bind(any).ok());
            taken.1 = taken.1.take().or_else(|| UdpSocket::bind(any).ok());
            taken.0.is_some() && taken.1.is_some()
        };
        gateway.run(bind).unwrap()
    });
    let is_short =
        |status: &Value| status["problems"].to_string().contains("lacks what probes take");
    lab.gateway.wait("the shortage is a problem", NOTICED, is_short).unwrap();
    // Many times as long as it takes to fail, if that counted: each target has had its turns.
    let turns = |status: &Value| status["uptime_seconds"].as_u64().unwrap();
    let since = turns(&lab.gateway.status().unwrap());
    lab.gateway.wait("time passes", NOTICED, |status| turns(status) > since + 4).unwrap();
    let status = lab.gateway.status().unwrap();
    assert!(plan::all_healthy(&status) && is_short(&status), "{status:#}");

    // All of them: probes that run at the same time would take a single port from each other.
    gateway.sysctl("ipv4/ip_local_port_range", "32768 60999").unwrap();
    drop(taken);
    lab.gateway.wait("it is over", NOTICED, |status| !is_short(status)).unwrap();
    assert!(plan::all_healthy(&lab.gateway.status().unwrap()));
}

#[test]
#[ignore = "needs root"]
fn reload_of_a_file_that_hangs_is_refused_and_blocks_nothing_else() {
    let mut lab = Lab::start();
    let file = lab.gateway.config();
    let (aside, good) = (file.with_extension("aside"), file.with_extension("good"));
    fs::rename(&file, &good).unwrap();
    mkfifo(&file, Mode::S_IRWXU).unwrap();
    let socket = socket(&lab);
    let mut reload = Command::new(lab.gateway.binary());
    reload.args(["reload", "--api"]).arg(&socket).stdout(Stdio::piped()).stderr(Stdio::piped());
    let reload = lab.topology.gateway.spawn(reload.arg("--config").arg(&file)).unwrap();
    let writer = open_for_writing(&file);
    fs::rename(&file, &aside).unwrap();
    fs::rename(&good, &file).unwrap();

    fails_over(&mut lab);
    // Waits for the one before, and for no longer than that.
    let weight = lab.gateway.slb(&["backend", "weight", "lab", "web-1", "11"]).unwrap();
    assert_eq!(weight.status.code(), Some(0), "{}", String::from_utf8_lossy(&weight.stderr));
    let refused = reload.wait_with_output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot read") && said.contains("nothing was changed"), "{said}");

    // What has hung hangs still.
    lab.gateway.terminate().unwrap();
    drop(writer);
}

/// The writer's end of a named pipe, as soon as there is a reader.
fn open_for_writing(path: &Path) -> File {
    let mut writer = None;
    wait_until("the agent reads the named pipe", || {
        let mut options = OpenOptions::new();
        writer = options.write(true).custom_flags(libc::O_NONBLOCK).open(path).ok();
        writer.is_some()
    });
    writer.unwrap()
}

/// Runs a command on the gateway.
fn run(lab: &Lab, args: &[&str], stdout: impl Into<Stdio>) -> Output {
    let mut command = Command::new(lab.gateway.binary());
    command.args(args).stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    let child = lab.topology.gateway.spawn(&mut command).unwrap();
    drop(command);
    child.wait_with_output().unwrap()
}

/// A pipe whose reader has gone away.
fn closed_pipe() -> PipeWriter {
    pipe().unwrap().1
}

#[test]
#[ignore = "needs root"]
fn commands_end_quietly_on_a_closed_pipe_and_with_an_error_on_a_full_disk() {
    let mut lab = Lab::start();
    let config = lab.gateway.config();
    let file = config.to_str().unwrap();
    let vip = vips(plan::WEB_PORT)[0].to_string();
    let pins = lab.gateway.pins();
    let commands: [&[&str]; 16] = [
        &["--help"],
        &["--version"],
        &["check", file],
        &["plan", file],
        &["status", "--config", file],
        &["status", "--json", "--config", file],
        &["reload", "--config", file],
        &["reload", "--json", "--config", file],
        &["distribution", "--window", "1ms", "--config", file],
        &["flows", "--config", file],
        &["explain", "tcp", "192.0.2.10:4000", &vip, "--config", file],
        &["events", "--config", file],
        &["listener", "start", "lab", "tcp/80", "--config", file],
        &["backend", "drain", "lab", "web-1", "--stop", "--config", file],
        &["decap", "--pins", pins.to_str().unwrap()],
        &["doctor", "--backend", "full-nat"],
    ];
    for args in commands {
        expect_unreadable(&lab, args);
    }
    // What was asked for is done all the same.
    let weight = |weight| ["backend", "weight", "lab", "web-1", weight, "--config", file];
    let closed = run(&lab, &weight("11"), closed_pipe());
    assert_eq!(closed.status.code(), Some(CLOSED_PIPE));
    assert_eq!(lab.gateway.status().unwrap()["generation"], 2);
    assert_eq!(run(&lab, &weight("12"), full()).status.code(), Some(1));
    assert_eq!(lab.gateway.status().unwrap()["generation"], 3);

    lab.gateway.terminate().unwrap();
    let unload = run(&lab, &["unload", "--config", file], closed_pipe());
    assert_eq!(unload.status.code(), Some(CLOSED_PIPE));
    let addresses = output(&lab.topology.gateway, "ip", &["-o", "addr", "show"]);
    for vip in vips(0) {
        assert!(!addresses.contains(&format!(" {}/", vip.ip())), "{addresses}");
    }

    // Errors that cannot be written change no exit code.
    let mut command = Command::new(lab.gateway.binary());
    for stderr in [Stdio::from(full()), closed_pipe().into()] {
        command.args(["check", "/nonexistent"]).stderr(stderr);
        assert_eq!(command.status().unwrap().code(), Some(2));
    }
}

fn full() -> File {
    OpenOptions::new().write(true).open("/dev/full").unwrap()
}

fn expect_unreadable(lab: &Lab, args: &[&str]) {
    let closed = run(lab, args, closed_pipe());
    let said = String::from_utf8(closed.stderr).unwrap();
    assert_eq!((closed.status.code(), &*said), (Some(CLOSED_PIPE), ""), "{args:?}");
    let full = run(lab, args, full());
    let said = String::from_utf8(full.stderr).unwrap();
    let expected = "slb: cannot write to stdout: No space left on device (os error 28)\n";
    assert_eq!((full.status.code(), &*said), (Some(1), expected), "{args:?}");
}
