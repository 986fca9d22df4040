//! Runs the CNI plugin as a container runtime does (CNI specification 1.1.0, section 2).

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde::Deserialize;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use crate::limits::CNI_TIME_MAX;

/// The version that is asked for.
const CNI_VERSION: &str = "1.1.0";

/// "Try again later": the only error of the specification after which ADD is repeated as it was.
pub(super) const TRY_AGAIN_LATER: u32 = 11;

/// What is attached: a pod on a node.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// The plugin's program.
    pub plugin: PathBuf,
    /// The agent's socket.
    pub socket: PathBuf,
    /// The pod's unique id, which is also the container id.
    pub uid: String,
    /// The pod's network namespace.
    pub network: PathBuf,
    /// The pod's namespace in the cluster.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
}

/// Why a plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The plugin answered with an error of the specification.
    #[error("CNI {verb}: {message} (code {code})")]
    Refused {
        /// The verb.
        verb: &'static str,
        /// The code of the specification.
        code: u32,
        /// Message and details.
        message: String,
    },
    /// The plugin could not be run, or answered nothing that can be read.
    #[error("CNI {verb}: {reason}")]
    Broken {
        /// The verb.
        verb: &'static str,
        /// What happened.
        reason: String,
    },
}

#[derive(Deserialize)]
struct Success {
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Ip {
    address: ipnet::IpNet,
}

#[derive(Deserialize)]
struct Failure {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Attachment {
    /// ADD: the addresses that the pod got.
    pub async fn add(&self) -> Result<Vec<IpAddr>, CniError> {
        let output = self.run("ADD").await?;
        let success: Success = serde_json::from_slice(&output).map_err(|error| CniError::Broken {
            verb: "ADD",
            reason: format!("the plugin's result cannot be read: {error}"),
        })?;
        if success.ips.is_empty() {
            return Err(CniError::Broken { verb: "ADD", reason: "the plugin's result has no address".to_owned() });
        }
        Ok(success.ips.into_iter().map(|ip| ip.address.addr()).collect())
    }

    /// DEL, which may be repeated.
    pub async fn delete(&self) -> Result<(), CniError> {
        self.run("DEL").await.map(drop)
    }

    async fn run(&self, verb: &'static str) -> Result<Vec<u8>, CniError> {
        let broken = |reason: String| CniError::Broken { verb, reason };
        let config = json!({
            "cniVersion": CNI_VERSION, "name": "portolan", "type": "portolan-cni", "socket": self.socket,
        });
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
            self.namespace, self.name, self.uid, self.uid
        );
        let mut plugin = tokio::process::Command::new(&self.plugin)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.uid)
            .env("CNI_NETNS", &self.network)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", self.plugin.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| broken(format!("running {}: {error}", self.plugin.display())))?;
        if let Some(mut input) = plugin.stdin.take() {
            // A plugin that does not read its configuration says so on stdout.
            let _ = input.write_all(config.to_string().as_bytes()).await;
        }
        let output = tokio::time::timeout(CNI_TIME_MAX, plugin.wait_with_output())
            .await
            .map_err(|_| broken(format!("the plugin did not end within {} s", CNI_TIME_MAX.as_secs())))?
            .map_err(|error| broken(error.to_string()))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let Ok(failure) = serde_json::from_slice::<Failure>(&output.stdout) else {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(broken(format!("the plugin ended with {}: {said}", output.status)));
        };
        let said: Vec<String> = [failure.msg, failure.details].into_iter().filter(|it| !it.is_empty()).collect();
        Err(CniError::Refused { verb, code: failure.code, message: said.join(": ") })
    }
}

impl CniError {
    /// Whether the plugin asked to be called again with the same arguments.
    pub fn is_temporary(&self) -> bool {
        matches!(self, CniError::Refused { code: TRY_AGAIN_LATER, .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn plugin(directory: &Path, script: &str) -> Attachment {
        let plugin = directory.join("plugin");
        std::fs::write(&plugin, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
        Attachment {
            plugin,
            socket: "/run/x/cni.sock".into(),
            uid: "u-1".into(),
            network: "/run/netns/x".into(),
            namespace: "shop".into(),
            name: "cart-1".into(),
        }
    }

    #[tokio::test]
    async fn a_plugin_sees_the_environment_of_the_specification() {
        let directory = tempfile::tempdir().unwrap();
        let seen = directory.path().join("seen");
        let script = format!(
            "(echo $CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME; echo $CNI_ARGS; cat) > {}\n\
             echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"10.42.0.7/24\"}},{{\"address\":\"fd00::7/64\"}}]}}'",
            seen.display()
        );
        let addresses = plugin(directory.path(), &script).add().await.unwrap();
        assert_eq!(addresses, ["10.42.0.7".parse::<IpAddr>().unwrap(), "fd00::7".parse().unwrap()]);
        let seen = std::fs::read_to_string(seen).unwrap();
        assert!(seen.starts_with("ADD u-1 /run/netns/x eth0\n"), "{seen}");
        assert!(seen.contains("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-1;"), "{seen}");
        assert!(seen.contains("\"socket\":\"/run/x/cni.sock\""), "{seen}");
    }

    #[tokio::test]
    async fn an_error_carries_code_and_message() {
        let directory = tempfile::tempdir().unwrap();
        let script = "echo '{\"code\":11,\"msg\":\"no addresses yet\"}'; exit 1";
        let error = plugin(directory.path(), script).add().await.unwrap_err();
        assert!(error.is_temporary());
        assert_eq!(error.to_string(), "CNI ADD: no addresses yet (code 11)");
        let error = plugin(directory.path(), "echo oh >&2; exit 3").delete().await.unwrap_err();
        assert_eq!(error.to_string(), "CNI DEL: the plugin ended with exit status: 3: oh");
    }
}
