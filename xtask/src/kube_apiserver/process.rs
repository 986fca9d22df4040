//! A real kube-apiserver and its etcd as child processes, on free ports of 127.0.0.1.
//!
//! It promises that nothing outlives its owner: dropping a [`Cluster`] kills both, server first (it
//! lingers once etcd is gone), and the kernel kills them when the thread that started them ends
//! without a drop. It uses the standard library and `curl` only, so that a test can include this
//! file as it is.

use std::fs::{self, File};
use std::io::{Error, Result};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The server's token, good for everything; it listens on loopback only, and lives for a test.
const TOKEN: &str = "portolan-test";

/// EndpointSlice v1, which a 1.20 server lacks.
const ENDPOINT_SLICES: &str = include_str!("../../recipes/endpointslice-v1.yaml");

const START_PATIENCE: Duration = Duration::from_mins(1);
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Where the recipe keeps the binary: `PORTOLAN_KUBE_APISERVER` names it, or else the cache has it.
pub(crate) fn default_directory() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    cache.unwrap_or_else(home).join("portolan/kube-apiserver")
}

/// The binaries that a cluster needs.
pub(crate) struct Binaries {
    kube_apiserver: PathBuf,
    etcd: PathBuf,
}

impl Binaries {
    /// Finds them, or says what is missing and how to get it.
    pub(crate) fn find() -> std::result::Result<Binaries, String> {
        let kube_apiserver = match std::env::var_os("PORTOLAN_KUBE_APISERVER") {
            Some(path) => PathBuf::from(path),
            None => default_directory().join("kube-apiserver"),
        };
        if !kube_apiserver.is_file() {
            return Err(format!("no kube-apiserver at {}: run `cargo xtask kube-apiserver`", kube_apiserver.display()));
        }
        let etcd = in_path("etcd").ok_or("no etcd: install the package etcd-server")?;
        for (program, package) in [("curl", "curl"), ("openssl", "openssl"), ("setpriv", "util-linux")] {
            in_path(program).ok_or_else(|| format!("no {program}: install the package {package}"))?;
        }
        Ok(Binaries { kube_apiserver, etcd })
    }
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|candidate| candidate.is_file())
}

/// A running server and its etcd.
pub(crate) struct Cluster {
    binaries: Binaries,
    directory: PathBuf,
    etcd_port: u16,
    port: u16,
    etcd: Child,
    server: Option<Child>,
}

impl Cluster {
    /// Starts both in a directory of their own, and waits until the server answers.
    pub(crate) fn start(binaries: Binaries, directory: &Path) -> Result<Cluster> {
        fs::create_dir_all(directory)?;
        let directory = directory.canonicalize()?;
        let [etcd_port, peer_port, port] = free_ports()?;
        let etcd = start_etcd(&binaries.etcd, &directory, etcd_port, peer_port)?;
        // From here on an error drops the cluster, and with it what runs.
        let mut cluster = Cluster { binaries, directory, etcd_port, port, etcd, server: None };
        cluster.write_credentials()?;
        cluster.start_server()?;
        cluster.serve_endpoint_slices()?;
        Ok(cluster)
    }

    /// A kubeconfig with all rights.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// Kills the server; etcd stays.
    pub(crate) fn kill_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            kill(&mut server);
        }
    }

    /// Starts the server, on the same port and with the same data as before.
    pub(crate) fn start_server(&mut self) -> Result<()> {
        let file = |name: &str| self.directory.join(name).display().to_string();
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.port),
            format!("--cert-dir={}", file("certificates")),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--api-audiences=api".to_owned(),
            format!("--service-account-key-file={}", file("accounts.pub")),
            format!("--service-account-signing-key-file={}", file("accounts.key")),
            // Pods are created without the controller that makes service accounts.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--feature-gates=IPv6DualStack=true".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/112".to_owned(),
            // The built-in v1beta1 would hide the group of our EndpointSlice v1 from discovery.
            "--runtime-config=discovery.k8s.io/v1beta1=false,extensions/v1beta1=false".to_owned(),
        ];
        let mut command = mortal(&self.binaries.kube_apiserver);
        command.args(arguments);
        self.server = Some(spawn(command, &self.directory.join("kube-apiserver.log"))?);
        self.wait_until("kube-apiserver", |cluster| cluster.get("/readyz"))
    }

    /// Whether the server or its etcd has ended by itself.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        let server = match &mut self.server {
            Some(server) => server.try_wait()?.is_some(),
            None => true,
        };
        Ok(server || self.etcd.try_wait()?.is_some())
    }

    fn write_credentials(&self) -> Result<()> {
        let file = |name: &str| self.directory.join(name);
        fs::write(file("tokens.csv"), format!("{TOKEN},admin,admin,system:masters\n"))?;
        openssl(&["genrsa", "-out"], &[&file("accounts.key"), Path::new("2048")])?;
        openssl(&["rsa", "-pubout", "-in"], &[&file("accounts.key"), Path::new("-out"), &file("accounts.pub")])?;
        // The server makes its own certificate when it first starts; the file holds its authority too.
        let authority = file("certificates/apiserver.crt");
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters:\n- name: test\n  cluster: {{server: \"https://127.0.0.1:{}\", certificate-authority: \"{}\"}}\n\
             users:\n- name: admin\n  user: {{token: {TOKEN}}}\n\
             contexts:\n- name: test\n  context: {{cluster: test, user: admin}}\n",
            self.port,
            authority.display(),
        );
        fs::write(self.kubeconfig(), kubeconfig)
    }

    fn serve_endpoint_slices(&mut self) -> Result<()> {
        let manifest = self.directory.join("endpointslice-v1.yaml");
        fs::write(&manifest, ENDPOINT_SLICES)?;
        let body = format!("@{}", manifest.display());
        let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        // A directory that was used before has it already, which the wait below finds.
        self.curl(path, &["--header", "Content-Type: application/yaml", "--data-binary", &body]);
        self.wait_until("EndpointSlice v1", |cluster| cluster.get("/apis/discovery.k8s.io/v1/endpointslices"))
    }

    fn get(&self, path: &str) -> bool {
        self.curl(path, &[])
    }

    fn curl(&self, path: &str, arguments: &[&str]) -> bool {
        let mut command = Command::new("curl");
        command.args(["--silent", "--insecure", "--fail", "--max-time", "5", "--output", "/dev/null"]);
        command.args(["--header", &format!("Authorization: Bearer {TOKEN}")]).args(arguments);
        command.arg(format!("https://127.0.0.1:{}{path}", self.port));
        command.status().is_ok_and(|status| status.success())
    }

    fn wait_until(&mut self, what: &str, ready: impl Fn(&Cluster) -> bool) -> Result<()> {
        let end = Instant::now() + START_PATIENCE;
        while !ready(self) {
            let ended = self.has_ended()?;
            if ended || Instant::now() > end {
                let why = if ended { "ended" } else { "did not answer in time" };
                let logs = self.directory.display();
                return Err(Error::other(format!("{what} {why}: see kube-apiserver.log and etcd.log in {logs}")));
            }
            sleep(POLL_INTERVAL);
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_server();
        kill(&mut self.etcd);
    }
}

fn start_etcd(etcd: &Path, directory: &Path, port: u16, peer_port: u16) -> Result<Child> {
    let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peer_port}"));
    let mut command = mortal(etcd);
    command.arg("--data-dir").arg(directory.join("etcd"));
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("default={peer}")]);
    spawn(command, &directory.join("etcd.log"))
}

/// A command that the kernel kills when the thread that starts it ends (prctl(2), PR_SET_PDEATHSIG).
fn mortal(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

fn kill(child: &mut Child) {
    // It may have ended by itself, which is as good.
    let _ = child.kill();
    let _ = child.wait();
}

fn openssl(arguments: &[&str], paths: &[&Path]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).args(paths).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::other(format!("openssl {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr))))
}

/// Ports that were free a moment ago: all are held until the last is known.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    let mut held = Vec::with_capacity(N);
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
