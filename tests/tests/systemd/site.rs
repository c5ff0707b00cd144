//! A gateway that is a machine with systemd, installed as README.md says.

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Output,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use slb_lab::{
    Client, Load, Machine, Outcome, Server, Service, Topology, gateway,
    topology::{INTERFACES, VIP_V4, VIP_V6},
};

/// Bound on what is waited for; above the unit's `WatchdogSec=` and what a loaded machine takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const POLL: Duration = Duration::from_millis(50);
/// New connections per second.
const RATE: u32 = 200;
/// Answers that show that the load goes on: a second of it.
const GOES_ON: u64 = 200;

pub(crate) const UNIT: &str = "/etc/systemd/system/slb.service";
pub(crate) const BINARY: &str = "/usr/local/sbin/slb";
pub(crate) const CONFIG: &str = "/etc/slb/slb.toml";
/// What the listener is served by.
const PORT: u16 = 80;
const SERVED: Service = Service::Http(8080);

/// Everything that runs. The order of the fields is the order in which it ends.
pub(crate) struct Site {
    pub machine: Machine,
    _servers: Vec<Server>,
    pub client: Client,
    pub topology: Topology,
}

impl Site {
    /// The unit is installed, and not started.
    pub(crate) fn install() -> Self {
        let topology = Topology::build().unwrap();
        let servers = topology.backends.iter().map(|host| Server::start(host, SERVED).unwrap());
        let servers = servers.collect();
        let client = Client::new(&topology.clients[0]);
        let machine = Machine::boot(&topology.gateway).unwrap();
        let site = Self { machine, _servers: servers, client, topology };

        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        fs::create_dir_all(site.machine.path("/etc/sysusers.d")).unwrap();
        fs::copy(docs.join("slb.sysusers.conf"), site.machine.path("/etc/sysusers.d/slb.conf"))
            .unwrap();
        fs::copy(docs.join("slb.service"), site.machine.path(UNIT)).unwrap();
        site.replace_binary(&fs::read(gateway::binary().unwrap()).unwrap());
        site.done(&["systemd-sysusers", "slb.conf"]);
        site.done(&["install", "-d", "-o", "slb", "-g", "slb", "-m", "750", "/etc/slb"]);
        site.done(&["install", "-o", "slb", "-g", "slb", "-m", "640", "/dev/null", CONFIG]);
        site.configure(&site.config(&INTERFACES));
        site.done(&["systemctl", "daemon-reload"]);
        site
    }

    /// [`install`](Self::install), and the unit is started.
    pub(crate) fn start() -> Self {
        let site = Self::install();
        site.done(&["systemctl", "start", "slb"]);
        site.wait_all_healthy();
        site
    }

    /// One listener, and every backend with the same weight.
    pub(crate) fn config(&self, interfaces: &[&str]) -> String {
        let mut text = format!(
            "[gateway]\ninterfaces = {interfaces:?}\nflows = 65_536\nannounce = \"arp\"\n\n\
             [[instance]]\nname = \"shop\"\nvips = [\"{VIP_V4}\", \"{VIP_V6}\"]\n\n",
        );
        for host in &self.topology.backends {
            let addresses = host.addresses().map(|address| address.to_string());
            write!(
                text,
                "[[instance.backend]]\nname = {:?}\naddress = {addresses:?}\nweight = 10\n\n",
                host.name
            )
            .unwrap();
        }
        write!(
            text,
            "[[instance.listener]]\nprotocol = \"tcp\"\nport = {PORT}\nbackend_port = {}\n\
             [instance.listener.health_check]\ntype = \"tcp\"\ninterval = \"500ms\"\n",
            SERVED.port()
        )
        .unwrap();
        text
    }

    /// Writes the file in place, as an editor of root's does that keeps the owner.
    pub(crate) fn configure(&self, text: &str) {
        fs::write(self.machine.path(CONFIG), text).unwrap();
    }

    pub(crate) fn read_config(&self) -> String {
        fs::read_to_string(self.machine.path(CONFIG)).unwrap()
    }

    /// Puts another file in the place of the binary, which may be in use.
    pub(crate) fn replace_binary(&self, content: &[u8]) {
        let (new, binary) =
            (self.machine.path("/usr/local/sbin/slb.new"), self.machine.path(BINARY));
        fs::write(&new, content).unwrap();
        fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        fs::rename(&new, &binary).unwrap();
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.machine.run(args).unwrap()
    }

    /// What a command prints that has to succeed.
    pub(crate) fn done(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {}: {said}", output.status);
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command prints, to either side, that has to fail.
    pub(crate) fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?} has succeeded");
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    }

    /// A property of the unit.
    pub(crate) fn property(&self, name: &str) -> String {
        let value = self.done(&["systemctl", "show", "slb", "--value", "--property", name]);
        value.trim().to_owned()
    }

    pub(crate) fn journal(&self) -> String {
        self.done(&["journalctl", "--no-pager", "--unit=slb"])
    }

    /// `slb status --json`, as root asks for it.
    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.done(&[BINARY, "status", "--json"])).unwrap()
    }

    /// Weight of the backend `name`, as the running agent has it.
    pub(crate) fn weight(&self, name: &str) -> u64 {
        let status = self.status();
        let backends = gateway::backends(&status, "tcp", PORT);
        let backend = backends.into_iter().find(|backend| backend["name"] == name).unwrap();
        backend["weight"].as_u64().unwrap()
    }

    pub(crate) fn wait_all_healthy(&self) {
        wait_until("all backends healthy", || {
            let status = self.status();
            let backends = gateway::backends(&status, "tcp", PORT);
            !backends.is_empty() && backends.iter().all(|backend| backend["health"] == "healthy")
        });
    }

    /// New connections until [`Load::stop`], of which some have been answered.
    pub(crate) fn load(&self) -> Load {
        let [v4, _] = vips();
        let load = Load::start(&self.client, v4, RATE).unwrap();
        goes_on(&load);
        load
    }

    /// Connections to both VIPs, all of which have to be answered; how many by which backend.
    pub(crate) fn expect_traffic(&self) -> [Outcome; 2] {
        vips().map(|vip| {
            let outcome = self.client.http(vip, 200, 8).unwrap();
            assert_eq!((outcome.ok(), outcome.failed()), (200, 0), "{vip}: {outcome}");
            outcome
        })
    }
}

pub(crate) fn vips() -> [SocketAddr; 2] {
    [IpAddr::from(VIP_V4), VIP_V6.into()].map(|vip| SocketAddr::new(vip, PORT))
}

/// Waits for more answers.
pub(crate) fn goes_on(load: &Load) {
    let wanted = load.so_far().ok() + GOES_ON;
    wait_until("the load gets its answers", || load.so_far().ok() >= wanted);
}

/// Ends a load, of which no connection may have failed.
pub(crate) fn expect_no_failure(load: Load) {
    goes_on(&load);
    let outcome = load.stop().unwrap();
    assert_eq!(outcome.failed(), 0, "{outcome}");
}

pub(crate) fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        thread::sleep(POLL);
    }
}
