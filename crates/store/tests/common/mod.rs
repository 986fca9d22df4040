//! A real etcd on loopback, with a directory of its own, that dies with its test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
#![expect(clippy::print_stdout, reason = "a test that cannot run says so")]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use portolan_store::{EtcdConfig, EtcdEndpoint};

/// What etcd says when it serves.
const READY: &str = "ready to serve client requests";

/// How often a port that was free a moment ago may be found taken.
const PORT_RETRIES: usize = 5;

/// One member.
pub(crate) struct Etcd {
    directory: tempfile::TempDir,
    name: String,
    pub(crate) client_port: u16,
    pub(crate) peer_port: u16,
    cluster: String,
    more: Vec<String>,
    child: Option<Child>,
}

/// Whether there is an etcd to test with; says so when there is none.
pub(crate) fn is_installed() -> bool {
    let found = |program: &str| Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok();
    let is_installed = found("etcd") && found("setpriv");
    if !is_installed {
        println!("skipped: etcd and setpriv are not both installed");
    }
    is_installed
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

impl Etcd {
    /// A member that is alone. `more` are further arguments.
    pub(crate) fn start(more: &[&str]) -> Etcd {
        for _ in 0..PORT_RETRIES {
            let mut etcd = Etcd::prepare("alone", more);
            etcd.cluster = etcd.peer();
            etcd.spawn();
            if etcd.is_ready() {
                return etcd;
            }
        }
        panic!("etcd does not start");
    }

    /// A cluster of three.
    pub(crate) fn start_three() -> Vec<Etcd> {
        for _ in 0..PORT_RETRIES {
            let mut members: Vec<Etcd> = ["one", "two", "three"].map(|name| Etcd::prepare(name, &[])).into();
            let cluster = members.iter().map(Etcd::peer).collect::<Vec<_>>().join(",");
            for member in &mut members {
                member.cluster.clone_from(&cluster);
                member.spawn();
            }
            if members.iter_mut().all(Etcd::is_ready) {
                return members;
            }
        }
        panic!("the cluster does not start");
    }

    fn prepare(name: &str, more: &[&str]) -> Etcd {
        // In memory where that is possible: what is tested is not the disk.
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Etcd {
            directory: tempfile::Builder::new().prefix("etcd-test-").tempdir_in(parent).unwrap(),
            name: name.to_owned(),
            client_port: free_port(),
            peer_port: free_port(),
            cluster: String::new(),
            more: more.iter().map(|it| (*it).to_owned()).collect(),
            child: None,
        }
    }

    fn peer(&self) -> String {
        format!("{}=http://127.0.0.1:{}", self.name, self.peer_port)
    }

    pub(crate) fn endpoint(&self) -> EtcdEndpoint {
        EtcdEndpoint { is_tls: self.is_tls(), authority: format!("127.0.0.1:{}", self.client_port) }
    }

    fn is_tls(&self) -> bool {
        self.more.iter().any(|argument| argument == "--cert-file")
    }

    /// How to reach it.
    pub(crate) fn config(&self) -> EtcdConfig {
        EtcdConfig::new(vec![self.endpoint()])
    }

    fn spawn(&mut self) {
        let (client, peer) = (self.endpoint().to_string(), format!("http://127.0.0.1:{}", self.peer_port));
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "etcd", "--name", &self.name, "--data-dir"])
            .arg(self.directory.path())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.cluster, "--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(&self.more)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        self.child = Some(child.unwrap());
    }

    /// Waits until it serves; `false` when it ended instead.
    fn is_ready(&mut self) -> bool {
        let mut lines = BufReader::new(self.child.as_mut().unwrap().stderr.take().unwrap()).lines();
        let is_ready = lines.by_ref().map_while(Result::ok).any(|line| line.contains(READY));
        // What it says later is of no interest, but must be read.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        is_ready
    }

    /// Kills it without warning. Its data stays.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it again where it was.
    pub(crate) fn restart(&mut self) {
        self.kill();
        for _ in 0..PORT_RETRIES {
            self.spawn();
            if self.is_ready() {
                return;
            }
        }
        panic!("etcd does not start again");
    }

    /// Starts it again with nothing of what it held.
    pub(crate) fn restart_empty(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.directory.path().join("member")).unwrap();
        self.restart();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
