//! Which of the two iptables a node uses.
//!
//! Rules in both do not see each other, and which of them a program changes depends on how it was built: the rules
//! of two programs on one node can undo each other (kubernetes/kubernetes#71305). So we take what is in use.

use std::fmt;
use std::path::PathBuf;

use portolan_net::Family;

use super::command::{find, run};
use crate::error::KernelError;
use crate::netns::Namespace;

/// One of the two implementations of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Backend {
    /// `ip_tables`: the whole table is replaced with each change.
    Legacy,
    /// `nf_tables`, by way of its compatibility layer.
    Nft,
}

impl Backend {
    /// Both.
    pub const ALL: [Backend; 2] = [Backend::Legacy, Backend::Nft];

    /// As in the names of its programs.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Legacy => "legacy",
            Backend::Nft => "nft",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Rules in both backends of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mix {
    /// How many rules `iptables-legacy` has.
    pub legacy: usize,
    /// How many rules `iptables-nft` has.
    pub nft: usize,
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "this node has rules in both iptables-legacy ({}) and iptables-nft ({}), which do not see each other; \
             let all programs use one of them (`update-alternatives --set iptables`) and flush the other",
            self.legacy, self.nft
        )
    }
}

/// The programs of a backend.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) backend: Backend,
    v4: Pair,
    v6: Pair,
}

#[derive(Debug, Clone)]
struct Pair {
    save: PathBuf,
    restore: PathBuf,
}

impl Programs {
    /// Those of a backend, under the names that they have wherever both are installed.
    pub(super) fn of(backend: Backend) -> Option<Programs> {
        let pair = |name: &str| {
            let save = find(&format!("{name}-{backend}-save"))?;
            Some(Pair { save, restore: find(&format!("{name}-{backend}-restore"))? })
        };
        Some(Programs { backend, v4: pair("iptables")?, v6: pair("ip6tables")? })
    }

    /// Those without a backend in their names, where only one is installed. They say which in their version.
    fn unnamed(namespace: &Namespace) -> Result<Option<Programs>, KernelError> {
        let pair = |name: &str| {
            Some(Pair { save: find(&format!("{name}-save"))?, restore: find(&format!("{name}-restore"))? })
        };
        let (Some(v4), Some(v6)) = (pair("iptables"), pair("ip6tables")) else { return Ok(None) };
        let version = run(&v4.restore, &["--version"], "", namespace)?.stdout;
        let backend = if version.contains("nf_tables") { Backend::Nft } else { Backend::Legacy };
        Ok(Some(Programs { backend, v4, v6 }))
    }

    pub(super) fn save(&self, family: Family) -> &PathBuf {
        &self.pair(family).save
    }

    pub(super) fn restore(&self, family: Family) -> &PathBuf {
        &self.pair(family).restore
    }

    fn pair(&self, family: Family) -> &Pair {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// What the node has in this backend. What cannot be read is not in use.
    fn usage(&self, namespace: &Namespace) -> Result<Usage, KernelError> {
        let mut usage = Usage::default();
        for family in Family::ALL {
            let output = run(self.save(family), &[], "", namespace)?;
            for line in output.stdout.lines() {
                usage.rules += usize::from(line.starts_with("-A "));
                usage.is_kubelets |= KUBELET_CHAINS.iter().any(|chain| is_declared(line, chain));
                usage.is_kubes |= line.starts_with(":KUBE-");
            }
        }
        Ok(usage)
    }
}

/// The chains by which the kubelet shows which backend it uses (KEP-3178; `iptables-wrappers` reads them).
const KUBELET_CHAINS: [&str; 2] = ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"];

fn is_declared(line: &str, chain: &str) -> bool {
    line.strip_prefix(':').and_then(|rest| rest.strip_prefix(chain)).is_some_and(|rest| rest.starts_with(' '))
}

/// What a node has in one backend.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Usage {
    rules: usize,
    /// Whether the kubelet uses it.
    is_kubelets: bool,
    /// Whether a kube-proxy uses it, or we do.
    is_kubes: bool,
}

/// The programs of the backend that is in use, and whether both are.
pub(super) fn detect(namespace: &Namespace) -> Result<(Programs, Option<Mix>), KernelError> {
    let (legacy, nft) = (Programs::of(Backend::Legacy), Programs::of(Backend::Nft));
    let usage = |programs: &Option<Programs>| match programs {
        Some(programs) => programs.usage(namespace),
        None => Ok(Usage::default()),
    };
    let (of_legacy, of_nft) = (usage(&legacy)?, usage(&nft)?);
    let programs = match (legacy, nft) {
        (Some(legacy), Some(nft)) => match choose(of_legacy, of_nft) {
            Backend::Legacy => legacy,
            Backend::Nft => nft,
        },
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => Programs::unnamed(namespace)?.ok_or(KernelError::MissingProgram {
            program: "iptables-restore",
            package: "iptables",
            doing: "serve Services by iptables",
        })?,
    };
    let is_mixed = of_legacy.rules > 0 && of_nft.rules > 0;
    Ok((programs, is_mixed.then_some(Mix { legacy: of_legacy.rules, nft: of_nft.rules })))
}

/// The kubelet's choice, then that of whoever served before us; else legacy where anything is in it.
fn choose(legacy: Usage, nft: Usage) -> Backend {
    match (legacy.is_kubelets, nft.is_kubelets) {
        (true, false) => return Backend::Legacy,
        (false, true) => return Backend::Nft,
        _ => {}
    }
    match (legacy.is_kubes, nft.is_kubes) {
        (true, _) => Backend::Legacy,
        (false, true) => Backend::Nft,
        (false, false) if legacy.rules > 0 => Backend::Legacy,
        (false, false) => Backend::Nft,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backend_in_use_is_taken() {
        let of = |rules, is_kubelets, is_kubes| Usage { rules, is_kubelets, is_kubes };
        let none = Usage::default();
        assert_eq!(choose(none, none), Backend::Nft);
        assert_eq!(choose(of(3, false, false), none), Backend::Legacy, "somebody uses legacy");
        assert_eq!(choose(of(3, false, false), of(9, false, true)), Backend::Nft, "Services are there already");
        assert_eq!(choose(of(3, false, true), of(9, false, true)), Backend::Legacy);
        assert_eq!(choose(of(3, false, true), of(9, true, true)), Backend::Nft, "the kubelet has chosen");
        assert!(is_declared(":KUBE-KUBELET-CANARY - [0:0]", "KUBE-KUBELET-CANARY"));
        assert!(!is_declared(":KUBE-KUBELET-CANARY-2 - [0:0]", "KUBE-KUBELET-CANARY"));
    }
}
