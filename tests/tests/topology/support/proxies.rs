//! nginx and HAProxy as backends, which read the PROXY protocol.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use slb_lab::Host;
use tempfile::TempDir;

use super::wait_until;

/// Where clients are served, each connection behind a header. Answers say in `x-backend` and in the body what is in that:
/// address and port of the client, then those that it has connected to.
pub(crate) const PORT: u16 = 8080;
/// Where health checks are answered, without a header, so that the log is about clients only.
pub(crate) const CHECK_PORT: u16 = 9090;

/// The program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Nginx,
    Haproxy,
}

/// A running proxy; dropping it ends it.
pub(crate) struct Proxy {
    kind: Kind,
    child: Child,
    folder: TempDir,
}

impl Proxy {
    /// Starts one on both addresses of `host`. The thread that calls this has to outlive it.
    pub(crate) fn start(host: &Host, kind: Kind) -> Self {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (config, mut command) = match kind {
            Kind::Nginx => {
                let mut command = Command::new("nginx");
                command.arg("-e").arg(at("error.log")).arg("-p").arg(folder.path());
                (nginx(host), command)
            }
            Kind::Haproxy => {
                let mut command = Command::new("haproxy");
                // Stays in the foreground.
                command.arg("-db");
                (haproxy(host), command)
            }
        };
        let flag = if kind == Kind::Nginx { "-c" } else { "-f" };
        fs::write(at("proxy.conf"), config).unwrap();
        command.arg(flag).arg(at("proxy.conf"));
        command.stdin(Stdio::null()).stdout(File::create(at("access.log")).unwrap());
        command.stderr(File::create(at("stderr.log")).unwrap());
        let child = host.netns.spawn(&mut command).unwrap();
        let mut proxy = Self { kind, child, folder };
        wait_until("the proxy listens", || proxy.listens(host));
        proxy
    }

    fn listens(&mut self, host: &Host) -> bool {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{:?}: {status}: {}", self.kind, self.complaints());
        }
        host.addresses().into_iter().all(|address| {
            let to = SocketAddr::new(address, CHECK_PORT);
            host.netns.run(|| TcpStream::connect(to).is_ok()).unwrap()
        })
    }

    /// What it has said about clients: a line for each request, with what is in the header, as in answers, and the
    /// path. HAProxy has other lines for connections that it refuses.
    pub(crate) fn log(&self) -> String {
        self.read("access.log")
    }

    /// Its errors: nginx tells here about connections that it refuses.
    pub(crate) fn complaints(&self) -> String {
        self.read("stderr.log") + &self.read("error.log")
    }

    fn read(&self, name: &str) -> String {
        let path: PathBuf = self.folder.path().join(name);
        fs::read_to_string(path).unwrap_or_default()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("lab: ending {:?}: {error}", self.kind);
        }
    }
}

fn nginx(host: &Host) -> String {
    let (v4, v6) = (host.v4, host.v6);
    format!(
        "daemon off;
master_process off;
user root;
pid nginx.pid;
error_log error.log warn;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path tmp;
    proxy_temp_path tmp;
    fastcgi_temp_path tmp;
    uwsgi_temp_path tmp;
    scgi_temp_path tmp;
    log_format client '$proxy_protocol_addr $proxy_protocol_port '
        '$proxy_protocol_server_addr $proxy_protocol_server_port $request_uri';
    server {{
        listen {v4}:{PORT} proxy_protocol fastopen=64;
        listen [{v6}]:{PORT} proxy_protocol fastopen=64;
        access_log access.log client;
        set $header '$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port';
        add_header x-backend $header;
        location / {{ return 200 $header; }}
    }}
    server {{
        listen {v4}:{CHECK_PORT} fastopen=64;
        listen [{v6}]:{CHECK_PORT} fastopen=64;
        access_log off;
        location / {{ return 200 'ok'; }}
    }}
}}
"
    )
}

fn haproxy(host: &Host) -> String {
    let (v4, v6) = (host.v4, host.v6);
    format!(
        "global
    nbthread 1
    log stdout len 1024 format raw local0 info
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
frontend clients
    bind {v4}:{PORT} accept-proxy tfo
    bind [{v6}]:{PORT} accept-proxy tfo
    log global
    log-format \"%ci %cp %fi %fp %HU\"
    http-request set-var-fmt(txn.header) \"%[src] %[src_port] %[dst] %[dst_port]\"
    http-request return status 200 content-type text/plain \
         lf-string %[var(txn.header)] hdr x-backend %[var(txn.header)]
frontend checks
    bind {v4}:{CHECK_PORT} tfo
    bind [{v6}]:{CHECK_PORT} tfo
    http-request return status 200
"
    )
}
