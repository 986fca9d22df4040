//! The fields of a `KubeProxyConfiguration` that have no effect here, each with its reason.

use serde_json::Value;

use super::document::Shown;
use super::options::Note;

/// A field, or all fields below it, with the reason why it has no effect and what to do instead.
struct Idle {
    path: &'static str,
    reason: &'static str,
    hint: &'static str,
}

const fn idle(path: &'static str, reason: &'static str, hint: &'static str) -> Idle {
    Idle { path, reason, hint }
}

const NOTHING_TO_DO: &str = "nothing need be done; remove the field to silence this";

/// Every field of kube-proxy's that is known and idle, by path; the fields that are read stand in `options`.
const IDLE: &[Idle] = &[
    idle("bindAddress", "the node's addresses are those of its Node object", "mend status.addresses of the Node"),
    idle("clientConnection.acceptContentTypes", "the agent asks for JSON, and reads it in a stream", NOTHING_TO_DO),
    idle("clientConnection.burst", "the agent watches, and asks for little", NOTHING_TO_DO),
    idle("clientConnection.contentType", "the agent asks for JSON, and reads it in a stream", NOTHING_TO_DO),
    idle("clientConnection.qps", "the agent watches, and asks for little", NOTHING_TO_DO),
    idle("configSyncPeriod", "what is watched needs no repeated listing", NOTHING_TO_DO),
    idle("enableProfiling", "there are no profiles of Go's", "use perf on the process"),
    idle("featureGates", "gates of kube-proxy's code are not gates of this one's", NOTHING_TO_DO),
    idle("iptables.minSyncPeriod", "a change is applied at once, and costs what it changes", NOTHING_TO_DO),
    idle(
        "iptables.snatNodeInternalIP",
        "masquerading takes the address of the link that a packet leaves by",
        NOTHING_TO_DO,
    ),
    idle("ipvs.minSyncPeriod", "a change is applied at once, and costs what it changes", NOTHING_TO_DO),
    idle("logging", "the agent logs to stderr, as RUST_LOG says", "set RUST_LOG, such as RUST_LOG=debug"),
    idle("nftables.minSyncPeriod", "a change is applied at once, and costs what it changes", NOTHING_TO_DO),
    idle(
        "oomScoreAdj",
        "the agent does not change how the kernel judges it",
        "set OOMScoreAdjust= in the unit, or a priority class on the pod",
    ),
    idle("portRange", "no port is opened for a Service; kube-proxy has not read it since 1.26 either", NOTHING_TO_DO),
    idle("showHiddenMetricsForVersion", "no metric is hidden", NOTHING_TO_DO),
    idle("windowsRunAsService", "it is for Windows", NOTHING_TO_DO),
    idle("winkernel", "it is for Windows", NOTHING_TO_DO),
];

/// The sections that hold further fields: a plain value in the place of one is a mistake.
pub(super) const SECTIONS: &[&str] = &[
    "clientConnection",
    "conntrack",
    "detectLocal",
    "featureGates",
    "iptables",
    "ipvs",
    "logging",
    "nftables",
    "winkernel",
];

/// What a field that nobody took comes to: nothing, where it says what it would be anyway; else a note.
pub(super) fn judge(path: &str, value: &Value, shown_path: &str) -> Option<Note> {
    let below =
        |idle: &&Idle| path.strip_prefix(idle.path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    match IDLE.iter().find(below) {
        Some(_) if is_zero(value) || is_usual(path, value) => None,
        Some(idle) => Some(Note::new(shown_path, format!("it has no effect here: {}", idle.reason), idle.hint)),
        None => {
            let reason =
                format!("it is no field of a KubeProxyConfiguration v1alpha1 that is known (`{}`)", Shown(value));
            Some(Note::new(shown_path, reason, "mend its name, or remove it"))
        }
    }
}

/// Go's zero value: what a file that was written by a program has everywhere.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => matches!(text.as_str(), "" | "0" | "0s" | "0.0.0.0" | "::"),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// What kube-proxy fills in by itself and writes into a file with `--write-config-to`.
fn is_usual(path: &str, value: &Value) -> bool {
    let usual = match path {
        "clientConnection.burst" => return value.as_u64() == Some(10),
        "clientConnection.qps" => return value.as_u64() == Some(5),
        "oomScoreAdj" => return value.as_i64() == Some(-999),
        "clientConnection.contentType" => "application/vnd.kubernetes.protobuf",
        "configSyncPeriod" => "15m0s",
        "iptables.minSyncPeriod" | "ipvs.minSyncPeriod" | "nftables.minSyncPeriod" => "1s",
        "logging.format" => "text",
        "logging.flushFrequency" => return value.as_u64() == Some(5_000_000_000) || value.as_str() == Some("5s"),
        "logging.options.json.infoBufferSize" | "logging.options.text.infoBufferSize" => "0",
        _ => return false,
    };
    value.as_str() == Some(usual)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_what_would_make_a_difference_to_kube_proxy_is_noted() {
        let reason = |path: &str, value: Value| judge(path, &value, path).map(|note| note.reason);
        assert_eq!(reason("winkernel.enableDSR", json!(false)), None);
        assert_eq!(reason("oomScoreAdj", json!(-999)), None);
        assert_eq!(reason("winkernel.enableDSR", json!(true)).unwrap(), "it has no effect here: it is for Windows");
        assert!(reason("featureGates.NFTablesProxyMode", json!(true)).unwrap().contains("gates of kube-proxy"));
        assert!(reason("portRanges", json!("1-2")).unwrap().contains("no field of a KubeProxyConfiguration"));
        assert!(reason("winkernels.enableDSR", json!(true)).unwrap().contains("no field"));
    }
}
