//! A real kube-proxy as a child process, and the API that it lists and watches.
//!
//! The API is scripted: it serves the objects that it is given, as they are, to anybody who asks on loopback of the
//! network namespace it is started in, and tells whoever watches what changes. Nothing outlives its owner: dropping a
//! [`KubeProxy`] kills it, and the kernel does where the owner is killed. It uses the standard library only, so that
//! a test can include this file and `place.rs` as they are.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::place;

/// Where Services are.
pub(crate) const SERVICES: &str = "/api/v1/services";

/// Where slices of endpoints are; kube-proxy 1.20 reads no newer version.
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1beta1/endpointslices";

/// Where nodes are.
pub(crate) const NODES: &str = "/api/v1/nodes";

/// The binary: `PORTOLAN_KUBE_PROXY` names it, or else the cache has it. If not, says how to get it.
pub(crate) fn find() -> std::result::Result<PathBuf, String> {
    let path = match std::env::var_os("PORTOLAN_KUBE_PROXY") {
        Some(path) => PathBuf::from(path),
        None => place::default_directory().join("kube-proxy"),
    };
    if path.is_file() {
        return Ok(path);
    }
    Err(format!("no kube-proxy at {}: run `cargo xtask kube-proxy`", path.display()))
}

/// The objects of one table by name, and who watches it.
#[derive(Default)]
struct Table {
    objects: BTreeMap<String, String>,
    watchers: Vec<TcpStream>,
    /// Whether somebody has listed it: from then on every change is kept.
    is_listed: bool,
    /// The changes since, as events. A list's revision is how many there were before it.
    changes: Vec<Vec<u8>>,
}

/// The API.
#[derive(Clone)]
pub(crate) struct Api {
    tables: Arc<Mutex<BTreeMap<&'static str, Table>>>,
    address: SocketAddr,
}

impl Api {
    /// Serves until the process ends, in the network namespace of the calling thread.
    pub(crate) fn start() -> Result<Api> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let tables = [SERVICES, SLICES, NODES].map(|path| (path, Table::default()));
        let api = Api { tables: Arc::new(Mutex::new(BTreeMap::from(tables))), address: listener.local_addr()? };
        let server = api.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = server.clone();
                thread::spawn(move || server.converse(&stream));
            }
        });
        Ok(api)
    }

    /// Puts an object into a table, in place of the one of that name, and tells who watches.
    pub(crate) fn put(&self, table: &'static str, name: &str, object: &str) {
        let mut tables = self.lock();
        let table = tables.entry(table).or_default();
        let known = table.objects.insert(name.to_owned(), object.to_owned());
        table.tell(if known.is_some() { "MODIFIED" } else { "ADDED" }, object);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Table>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn converse(&self, mut stream: &TcpStream) -> Result<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let mut request = String::new();
            if reader.read_line(&mut request)? == 0 {
                return Ok(());
            }
            let mut body_length = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line)?;
                if line.trim().is_empty() {
                    break;
                }
                if let Some((name, value)) = line.split_once(':')
                    && name.eq_ignore_ascii_case("content-length")
                {
                    body_length = value.trim().parse().unwrap_or(0);
                }
            }
            reader.read_exact(&mut vec![0; body_length])?;
            let mut words = request.split(' ');
            let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            if method == "GET" && query.contains("watch=true") {
                return self.watch(stream, path, query);
            }
            let (status, answer) = if method == "GET" { self.get(path) } else { ("201 Created", "{}".to_owned()) };
            let length = answer.len();
            write!(
                stream,
                "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{answer}"
            )?;
        }
    }

    /// Tells what changed since the list, and from now on what changes.
    fn watch(&self, mut stream: &TcpStream, path: &str, query: &str) -> Result<()> {
        let mut tables = self.lock();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        let Some(table) = tables.get_mut(path) else { return Ok(()) };
        let revision = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion="));
        let seen: usize = revision.and_then(|text| text.parse().ok()).unwrap_or(0);
        for change in table.changes.iter().skip(seen.saturating_sub(1)) {
            stream.write_all(change)?;
        }
        table.watchers.push(stream.try_clone()?);
        Ok(())
    }

    fn get(&self, path: &str) -> (&'static str, String) {
        let mut tables = self.lock();
        let (version, kind) = match path {
            SERVICES => ("v1", "ServiceList"),
            SLICES => ("discovery.k8s.io/v1beta1", "EndpointSliceList"),
            NODES => ("v1", "NodeList"),
            _ => {
                let node = path.strip_prefix("/api/v1/nodes/").and_then(|name| tables.get(NODES)?.objects.get(name));
                let missing =
                    r#"{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}"#;
                return node.map_or(("404 Not Found", missing.to_owned()), |node| ("200 OK", node.clone()));
            }
        };
        let Some(table) = tables.get_mut(path) else { return ("404 Not Found", "{}".to_owned()) };
        table.is_listed = true;
        // A watch from revision 0 would be one from anywhere.
        let revision = table.changes.len() + 1;
        let items = table.objects.values().map(String::as_str).collect::<Vec<_>>().join(",");
        let head =
            format!(r#"{{"kind":"{kind}","apiVersion":"{version}","metadata":{{"resourceVersion":"{revision}"}}"#);
        ("200 OK", format!(r#"{head},"items":[{items}]}}"#))
    }
}

impl Table {
    fn tell(&mut self, what: &str, object: &str) {
        if !self.is_listed {
            return;
        }
        let event = event(what, object);
        // Who does not listen any more is forgotten.
        self.watchers.retain_mut(|watcher| watcher.write_all(&event).is_ok());
        self.changes.push(event);
    }
}

/// An event of a watch as one chunk of HTTP.
fn event(what: &str, object: &str) -> Vec<u8> {
    let text = format!("{{\"type\":\"{what}\",\"object\":{object}}}\n");
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}

/// A running kube-proxy.
pub(crate) struct KubeProxy {
    /// Its process.
    pub(crate) child: Child,
}

impl KubeProxy {
    /// Starts it in the network namespace of the calling thread, with these fields of a `KubeProxyConfiguration`
    /// besides those that lead it to the API. Its files are in the directory; `kube-proxy.log` is its log.
    pub(crate) fn start(binary: &Path, api: &Api, directory: &Path, node: &str, fields: &str) -> Result<KubeProxy> {
        fs::create_dir_all(directory)?;
        let kubeconfig = directory.join("kubeconfig");
        let address = api.address;
        fs::write(
            &kubeconfig,
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: test\nusers: []\n\
                 clusters: [{{name: test, cluster: {{server: \"http://{address}\"}}}}]\n\
                 contexts: [{{name: test, context: {{cluster: test}}}}]\n"
            ),
        )?;
        let configuration = directory.join("configuration.yaml");
        let client = format!(
            "{{kubeconfig: \"{}\", contentType: application/json, acceptContentTypes: application/json, \
             qps: 1000, burst: 1000}}",
            kubeconfig.display()
        );
        fs::write(
            &configuration,
            // The limits of connection tracking are the machine's, not the namespace's.
            format!(
                "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                 clientConnection: {client}\nhostnameOverride: {node}\nhealthzBindAddress: 127.0.0.1:10256\n\
                 metricsBindAddress: 127.0.0.1:10249\n\
                 conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n{fields}"
            ),
        )?;
        let log = File::create(directory.join("kube-proxy.log"))?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(binary).arg("--config").arg(&configuration);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(KubeProxy { child: command.spawn()? })
    }

    /// An error with the end of the log, if it has ended by itself.
    pub(crate) fn check(&mut self, directory: &Path) -> Result<()> {
        let Some(status) = self.child.try_wait()? else { return Ok(()) };
        let log = fs::read_to_string(directory.join("kube-proxy.log")).unwrap_or_default();
        let last = log.lines().rev().take(5).collect::<Vec<_>>().join("\n");
        Err(Error::other(format!("kube-proxy ended with {status}:\n{last}")))
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
