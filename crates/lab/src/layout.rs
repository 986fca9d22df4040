//! Where a lab keeps its things, and how they are named.
//!
//! Everything is in one directory, `/run/portolan/labs/NAME`, and in network namespaces that are
//! named `portolan-NAME-…`, so that `ip netns` shows them and a crash leaves nothing unfindable.

use std::path::{Path, PathBuf};

use crate::limits::LAB_NAME_LENGTH_MAX;
use crate::{LabError, Result};

/// The directory of all labs, unless [`DIRECTORY_VARIABLE`] names another.
pub(crate) const LABS_DIRECTORY: &str = "/run/portolan/labs";

/// The environment variable that moves [`LABS_DIRECTORY`].
pub const DIRECTORY_VARIABLE: &str = "PORTOLAN_LAB_DIRECTORY";

/// The name of a lab that was given none.
pub const DEFAULT_NAME: &str = "lab";

/// Paths and names of one lab.
#[derive(Debug, Clone)]
pub struct Layout {
    name: String,
    directory: PathBuf,
}

impl Layout {
    /// The layout of the lab with this name.
    ///
    /// # Errors
    /// If the name cannot be part of a namespace's name.
    pub fn new(name: &str) -> Result<Layout> {
        let fits = !name.is_empty()
            && name.len() <= LAB_NAME_LENGTH_MAX
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-');
        if !fits {
            return Err(LabError::usage(
                format!("`{name}` cannot be the name of a lab"),
                format!("use lower-case letters, digits and inner hyphens, at most {LAB_NAME_LENGTH_MAX} characters"),
            ));
        }
        Ok(Layout { name: name.to_owned(), directory: Layout::labs().join(name) })
    }

    /// The layout of a lab below another directory.
    #[cfg(test)]
    pub(crate) fn within(labs: &Path, name: &str) -> Result<Layout> {
        Ok(Layout { directory: labs.join(name), ..Layout::new(name)? })
    }

    /// The directory that holds one directory per lab.
    pub fn labs() -> PathBuf {
        std::env::var_os(DIRECTORY_VARIABLE).map_or_else(|| LABS_DIRECTORY.into(), PathBuf::from)
    }

    /// The names of the labs that exist, sorted.
    pub fn existing() -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(Layout::labs()) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| Layout::new(name).is_ok_and(|layout| layout.description().exists()))
            .collect();
        names.sort();
        names
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lab's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What the lab is: written before anything of it is made.
    pub fn description(&self) -> PathBuf {
        self.directory.join("lab.json")
    }

    /// The objects to create, as they were read from the manifests.
    pub fn manifests(&self) -> PathBuf {
        self.directory.join("manifests.json")
    }

    /// The API server's socket.
    pub fn api_socket(&self) -> PathBuf {
        self.directory.join("api.sock")
    }

    /// The API server's data, in memory.
    pub fn api_data(&self) -> PathBuf {
        self.directory.join("api")
    }

    /// The file that kubectl reads.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// Where the supervisor takes commands.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.join("supervisor.sock")
    }

    /// The supervisor's process id, for people.
    pub fn supervisor_pid(&self) -> PathBuf {
        self.directory.join("supervisor.pid")
    }

    /// What the supervisor says.
    pub fn supervisor_log(&self) -> PathBuf {
        self.directory.join("supervisor.log")
    }

    /// The configuration of the cluster's DNS servers.
    pub fn cluster_dns(&self) -> PathBuf {
        self.directory.join("cluster-dns.yaml")
    }

    /// The configuration of the DNS server outside the cluster.
    pub fn outside_dns(&self) -> PathBuf {
        self.directory.join("outside-dns.yaml")
    }

    /// The names of the namespaces that are this lab's: a file each, made before the namespace.
    pub fn claims(&self) -> PathBuf {
        self.directory.join("namespaces")
    }

    /// The longest path of a socket that a lab with these members has.
    pub(crate) fn longest_socket<'member>(&self, members: impl Iterator<Item = &'member str>) -> PathBuf {
        let nodes = members.map(|member| self.node(member).join("agent.sock"));
        nodes.chain([self.control_socket()]).max_by_key(|path| path.as_os_str().len()).unwrap_or_default()
    }

    /// The directory of a node.
    pub fn node(&self, node: &str) -> PathBuf {
        self.directory.join("nodes").join(node)
    }

    /// The directory of all pods.
    pub fn pods(&self) -> PathBuf {
        self.directory.join("pods")
    }

    /// The directory of a pod.
    pub fn pod(&self, uid: &str) -> PathBuf {
        self.pods().join(uid)
    }

    /// The name of the namespace of a node, client or router.
    pub fn namespace(&self, member: &str) -> String {
        format!("portolan-{}-{member}", self.name)
    }

    /// The name of a pod's namespace. The whole uid is in it: two may well begin alike.
    pub fn pod_namespace(&self, uid: &str) -> String {
        format!("portolan-{}-pod-{uid}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_name_a_namespace_are_refused() {
        for name in ["", "-a", "a-", "A", "a/b", "..", "a b", &"a".repeat(25)] {
            assert!(Layout::new(name).is_err(), "{name:?} was taken");
        }
        assert_eq!(
            Layout::new("a-1").map(|layout| layout.namespace("node-1")).ok(),
            Some("portolan-a-1-node-1".into())
        );
    }

    #[test]
    fn pods_whose_uids_begin_alike_have_namespaces_of_their_own() {
        let layout = Layout::new("lab").unwrap();
        assert_eq!(layout.pod_namespace("0a1b2c3d-4e5f-6071"), "portolan-lab-pod-0a1b2c3d-4e5f-6071");
        assert_ne!(layout.pod_namespace("0a1b2c3d-4e5f-6071"), layout.pod_namespace("0a1b2c3d-4e5f-6072"));
    }
}
