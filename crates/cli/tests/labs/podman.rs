//! A container runtime of the field, podman with its CNI backend, on a node of a lab.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::common::{CART, Done, PROGRAM, TestLab, has};

/// podman's own files, its plugin and its network, in a directory of the lab.
struct Podman<'a> {
    lab: &'a TestLab,
    directory: PathBuf,
}

/// What runs inside the node: its network, and a mount namespace with cgroups that podman can read.
///
/// Nothing that is mounted there comes out, but for the pods' namespaces under `/run/netns`: the agent must
/// see them, as it does where a runtime runs beside it.
const ENTER: &str = "for mount in / /run /tmp /var; do mount --make-private $mount 2>/dev/null; done
mount --make-rprivate /sys
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup && exec podman \"$@\"";

impl Podman<'_> {
    fn new<'a>(lab: &'a TestLab, node: &str) -> Podman<'a> {
        let directory = lab.directory().join("podman");
        for name in ["bin", "net.d", "root/bin", "root/proc", "root/sys", "root/dev", "root/etc", "root/tmp"] {
            std::fs::create_dir_all(directory.join(name)).expect("a directory");
        }
        std::fs::copy("/usr/bin/busybox", directory.join("root/bin/busybox")).expect("busybox");
        for name in ["sh", "ip", "sleep", "nc"] {
            symlink("busybox", directory.join("root/bin").join(name)).expect("a link");
        }
        symlink(PROGRAM, directory.join("bin/portolan-cni")).expect("the plugin");
        let write = |name: &str, text: String| std::fs::write(directory.join(name), text).expect("a file");
        let here = directory.display();
        write(
            "containers.conf",
            format!(
                "[engine]\ncgroup_manager=\"cgroupfs\"\nevents_logger=\"file\"\nruntime=\"crun\"\ntmp_dir=\"{here}/tmp\"\n\
                 [network]\nnetwork_backend=\"cni\"\nnetwork_config_dir=\"{here}/net.d\"\n\
                 cni_plugin_dirs=[\"{here}/bin\"]\ndefault_network=\"pods\"\n[containers]\ncgroups=\"disabled\"\n"
            ),
        );
        write(
            "storage.conf",
            format!("[storage]\ndriver=\"vfs\"\nrunroot=\"{here}/run\"\ngraphroot=\"{here}/graph\"\n"),
        );
        let socket = lab.node_directory(node).join("cni.sock");
        let network = serde_json::json!({
            "cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "portolan-cni", "socket": socket}],
        });
        write("net.d/10-pods.conflist", network.to_string());
        Podman { lab, directory }
    }

    fn run(&self, arguments: &[&str]) -> Done {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.lab.namespace("node-1").display()));
        command
            .args(["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", ENTER, "podman", "--log-level=warn"])
            .args(arguments);
        command.env("CONTAINERS_CONF", self.directory.join("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", self.directory.join("storage.conf"));
        Done::of(&mut command)
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let done = self.run(arguments);
        assert_eq!(done.code, 0, "podman {}: {}{}", arguments.join(" "), done.stdout, done.stderr);
        done.stdout
    }

    fn start(&self, name: &str) -> Done {
        let root = self.directory.join("root");
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000", "--network", "pods"];
        let mut arguments = vec!["run", "-d", "--name", name];
        arguments.extend(limits);
        arguments.extend(["--rootfs", root.to_str().unwrap(), "/bin/sleep", "1000"]);
        self.run(&arguments)
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "-f", "-a", "-t", "0"]);
    }
}

#[test]
fn a_container_of_podman_reaches_the_pods_of_the_cluster() {
    let Some(lab) = TestLab::new() else { return };
    let tools = [("podman", "podman"), ("crun", "crun"), ("busybox", "busybox-static")];
    if !tools.iter().all(|(program, package)| has(program, package)) || !is_static(Path::new("/usr/bin/busybox")) {
        return;
    }
    lab.up(CART, &["--nodes", "2"]);
    let before = lab.pods_on("node-1").len();
    let podman = Podman::new(&lab, "node-1");
    let started = podman.start("one");
    assert_eq!(started.code, 0, "{}{}", started.stdout, started.stderr);

    let inspected: Value = serde_json::from_str(&podman.succeeds(&["inspect", "one"])).expect("JSON");
    let network = &inspected[0]["NetworkSettings"]["Networks"]["pods"];
    let address = network["IPAddress"].as_str().expect("an address").to_owned();
    let pods = lab.pods_on("node-1");
    assert!(pods.iter().any(|pod| pod.addresses.contains(&address.parse().unwrap())), "{address} of {pods:?}");
    let shown = podman.succeeds(&["exec", "one", "/bin/ip", "-4", "addr", "show", "dev", "eth0"]);
    assert!(shown.contains(&format!("{address}/24")), "{shown}");

    // A pod of another node, and a Service.
    let other = lab.pod_on("node-2", "cart").addresses[0];
    for to in [other, lab.service("cart")[0]] {
        let ask = format!("echo hello | /bin/nc -w 5 {to} 7070");
        assert_eq!(podman.succeeds(&["exec", "one", "/bin/sh", "-c", &ask]), "hello\n", "{to}");
    }
    let back = lab.shell("node-2", &format!("ping -c 1 -W 5 {address} >/dev/null && echo yes || echo no"));
    assert!(!has("ping", "iputils-ping") || back == "yes\n", "{back}");

    let second = podman.start("two");
    assert_eq!(second.code, 0, "{}{}", second.stdout, second.stderr);
    assert_eq!(lab.pods_on("node-1").len(), before + 2);
    podman.succeeds(&["rm", "-f", "-t", "0", "one"]);
    podman.succeeds(&["rm", "-f", "-t", "0", "two"]);
    assert_eq!(lab.pods_on("node-1").len(), before);
    lab.assert_as_planned();

    // What the agent refuses, podman shows as it was said.
    lab.crash();
    let refused = podman.start("three");
    assert_ne!(refused.code, 0, "{}", refused.stdout);
    assert!(refused.stderr.contains("the portolan agent does not answer"), "{}", refused.stderr);
}

/// In a root file system of its own there is no loader for another. A program names its loader in a header
/// of the kind `PT_INTERP` (elf(5)); where all the headers are, the file's first 64 bytes say.
fn is_static(program: &Path) -> bool {
    const PT_INTERP: u32 = 3;
    let bytes = std::fs::read(program).unwrap_or_default();
    let number = |offset: usize, length: usize| {
        let field = bytes.get(offset..offset + length)?;
        Some(field.iter().rev().fold(0_usize, |number, byte| number << 8 | usize::from(*byte)))
    };
    let header = |index: usize| number(number(32, 8)? + index * number(54, 2)?, 4);
    let is_static = number(56, 2).is_some_and(|count| (0..count).all(|it| header(it) != Some(PT_INTERP as usize)));
    if !is_static {
        println!("skipped: {} needs a loader: install the package busybox-static", program.display());
    }
    is_static
}
