use tokio::{
    net::{TcpListener, UdpSocket},
    sync::mpsc::{UnboundedReceiver, error::TryRecvError},
};

use super::*;
use crate::config::{ProbeKind, UdpProbe};

fn check() -> Arc<HealthCheck> {
    Arc::new(HealthCheck {
        probe: ProbeKind::Tcp,
        port: None,
        interval: Duration::from_millis(5),
        timeout: Duration::from_secs(60),
        healthy: 2,
        unhealthy: 2,
        passive: false,
        proxy_header: false,
    })
}

fn target(addr: SocketAddr) -> Target {
    Target { addr, check: check(), initial: Health::Unknown }
}

fn checkers() -> (Checkers<u32>, UnboundedReceiver<Event<u32>>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (Checkers::new(sender), receiver)
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

async fn transition(events: &mut UnboundedReceiver<Event<u32>>) -> (u32, Health) {
    let event = events.recv().await.unwrap();
    (event.key, event.health)
}

#[tokio::test]
async fn given_a_backend_when_it_goes_and_comes_back_then_each_transition_is_told_once() {
    let (checkers, mut events) = checkers();
    let mut checkers = checkers;
    let (listener, addr) = listen().await;
    checkers.set([(7, target(addr))]);
    let up = events.recv().await.unwrap();
    assert_eq!((up.key, up.health, up.reason), (7, Health::Healthy, None));

    drop(listener);
    let down = events.recv().await.unwrap();
    let reason = Some("connection refused".to_owned());
    assert_eq!((down.key, down.health, &down.reason), (7, Health::Unhealthy, &reason));
    let status = checkers.statuses().get(&7).unwrap();
    assert_eq!(status.health, Health::Unhealthy);
    assert_eq!(status.last_failure.map(|failure| failure.reason), reason.clone());
    assert_eq!(status.last.map(|probe| probe.failure), Some(reason));

    let _listener = TcpListener::bind(addr).await.unwrap();
    assert_eq!(transition(&mut events).await, (7, Health::Healthy));
}

#[tokio::test]
async fn given_a_known_backend_when_probes_agree_then_nothing_is_told() {
    let (mut checkers, mut events) = checkers();
    let (listener, addr) = listen().await;
    checkers.set([(1, Target { initial: Health::Healthy, ..target(addr) })]);
    for _ in 0..5 {
        listener.accept().await.unwrap();
    }
    assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
    assert_eq!(checkers.statuses().get(&1).unwrap().health, Health::Healthy);
}

#[tokio::test]
async fn given_running_checks_when_others_are_wanted_then_only_the_difference_changes() {
    let (mut checkers, mut events) = checkers();
    let ((_kept, kept), (_new, new)) = (listen().await, listen().await);
    let (gone_listener, gone) = listen().await;
    checkers.set([(1, target(kept)), (2, target(gone))]);
    let mut first = [transition(&mut events).await, transition(&mut events).await];
    first.sort_by_key(|&(key, _)| key);
    assert_eq!(first, [(1, Health::Healthy), (2, Health::Healthy)]);

    // An equal check in another allocation is no change, and so is another initial state.
    let same = Target { initial: Health::Unhealthy, ..target(kept) };
    checkers.set([(1, same), (3, target(new))]);
    drop(gone_listener);

    assert_eq!(transition(&mut events).await, (3, Health::Healthy), "the only news");
    assert_eq!(checkers.statuses().get(&1).unwrap().health, Health::Healthy, "kept");
    assert_eq!(checkers.statuses().get(&2), None, "stopped");
    assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
}

#[tokio::test]
async fn another_address_starts_with_the_health_that_the_caller_gives() {
    let (mut checkers, mut events) = checkers();
    let (_old_listener, old) = listen().await;
    checkers.set([(1, target(old))]);
    assert_eq!(transition(&mut events).await, (1, Health::Healthy));

    let (listener, addr) = listen().await;
    drop(listener);
    checkers.set([(1, Target { initial: Health::Healthy, ..target(addr) })]);
    assert_eq!(
        checkers.statuses().get(&1).unwrap().health,
        Health::Healthy,
        "until probes say else"
    );
    assert_eq!(transition(&mut events).await, (1, Health::Unhealthy));
}

/// A target that is healthy, and probed next in an hour.
fn seldom(addr: SocketAddr) -> Target {
    let interval = Duration::from_secs(7_200);
    let check = HealthCheck { interval, ..(*check()).clone() };
    Target { addr, check: Arc::new(check), initial: Health::Healthy }
}

#[tokio::test]
async fn suspicion_alone_takes_nothing_out_and_causes_few_probes() {
    let (mut checkers, mut events) = checkers();
    let (listener, addr) = listen().await;
    checkers.set([(1, seldom(addr))]);
    let begin = Instant::now();
    let mut probes = 0;
    while begin.elapsed() < SUSPECTED_EVERY * 3 / 2 {
        checkers.suspect(&1, "refused the last 3 connections of clients".to_owned());
        let probed = tokio::time::timeout(Duration::from_millis(5), listener.accept()).await;
        probes += u32::from(probed.is_ok());
    }
    assert_eq!(probes, 2, "one at once, one a second later");
    assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
    assert_eq!(checkers.statuses().get(&1).unwrap().health, Health::Healthy);
}

#[tokio::test]
async fn suspected_target_is_probed_at_once_until_enough_probes_have_failed() {
    let (mut checkers, mut events) = checkers();
    let (listener, addr) = listen().await;
    checkers.set([(1, seldom(addr))]);
    drop(listener);
    checkers.suspect(&1, "refused the last 3 connections of clients".to_owned());
    let event = tokio::time::timeout(SUSPECTED_EVERY, events.recv()).await.unwrap().unwrap();
    assert_eq!(event.health, Health::Unhealthy);
    let expected =
        "connection refused; probed early, as it refused the last 3 connections of clients";
    assert_eq!(event.reason.as_deref(), Some(expected));
}

#[tokio::test]
async fn event_of_a_checker_that_was_replaced_is_not_current() {
    let (mut checkers, mut events) = checkers();
    let (_listener, addr) = listen().await;
    checkers.set([(1, target(addr))]);
    let first = events.recv().await.unwrap();
    assert!(checkers.is_current(&first));

    checkers.set([]);
    assert!(!checkers.is_current(&first), "stopped");
    checkers.set([(1, target(addr))]);
    assert!(!checkers.is_current(&first), "started again");
    assert!(checkers.is_current(&events.recv().await.unwrap()));
}

#[tokio::test]
async fn given_running_checks_when_dropped_then_all_tasks_end() {
    let (mut checkers, mut events) = checkers();
    let (_listener, addr) = listen().await;
    checkers.set((0..10).map(|key| (key, target(addr))));
    drop(checkers);
    // Every task holds a sender, so the channel ends with the last of them.
    while events.recv().await.is_some() {}
}

#[tokio::test]
async fn given_a_slow_backend_when_probed_then_probes_do_not_overlap() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let probe = UdpProbe { send: "ping".into(), receive: Some("pong".into()) };
    let slow = HealthCheck { probe: ProbeKind::Udp(probe), ..(*check()).clone() };
    let (mut checkers, _events) = checkers();
    let addr = socket.local_addr().unwrap();
    checkers.set([(1, Target { check: Arc::new(slow), ..target(addr) })]);

    let mut question = [0; 16];
    let (_, first) = socket.recv_from(&mut question).await.unwrap();
    let early = tokio::time::timeout(4 * check().interval, socket.recv_from(&mut question));
    assert!(early.await.is_err(), "another probe while the first is unanswered");
    socket.send_to(b"pong", first).await.unwrap();
    socket.recv_from(&mut question).await.unwrap();
}

#[tokio::test]
async fn given_a_gateway_short_of_descriptors_when_probes_fail_then_health_stays() {
    let (sender, mut events) = mpsc::unbounded_channel();
    let addr = SocketAddr::from(([127, 0, 0, 1], 9));
    let mut task = Task {
        key: 1,
        number: 1,
        addr,
        check: check(),
        phase: Duration::ZERO,
        shared: Arc::new(Shared::new(Tracker::new(Health::Healthy, 1, 1))),
        events: sender,
        failures: None,
        unsuspected_until: Instant::now(),
    };
    let local = || Failure::from(std::io::Error::from_raw_os_error(libc::EMFILE));
    task.record(Err(local()), Duration::ZERO, None);
    assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
    let status = task.shared.lock().status.clone();
    assert_eq!(status.last_failure.unwrap().reason, local().to_string());
    assert_eq!(status.shortage, Some(local().to_string()));
    task.record(Ok(()), Duration::ZERO, None);
    assert_eq!(task.shared.lock().status.shortage, None);
}

#[test]
fn given_many_targets_when_spread_then_they_fill_the_interval_evenly() {
    let mut tenths = [0; 10];
    for key in 0..5000_u32 {
        let phase = phase(&key, Duration::from_secs(2));
        tenths[((phase.as_millis() / 200) as usize).min(9)] += 1;
    }
    assert!(tenths.iter().all(|tenth| (400..600).contains(tenth)), "{tenths:?}");
}
