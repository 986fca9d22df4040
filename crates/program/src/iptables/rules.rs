//! The rules of a chain: a list, or made of a port's endpoints whenever they are asked for.
//!
//! With 10,000 Services of 10 endpoints, 100,000 chains of two rules hold nothing that their endpoints do not say. As
//! lists they took 15 MiB, and those that balance 5 MiB more.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;
use portolan_intent::services::Backend;
use portolan_net::Protocol;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::base::Shared;
use super::names::endpoint_chain_of;
use super::{ChainName, Match, Name, Recent, RecentAction, Rule, RuleBuilder, Target};

/// The rules of a chain, in order.
#[derive(Clone)]
pub struct Rules(Source);

#[derive(Clone)]
enum Source {
    Listed(Arc<Vec<Rule>>),
    /// Those of one endpoint of a port.
    Endpoint(Arc<PortEndpoints>, u32),
    /// Those of a head, and then those that choose one of a port's endpoints.
    Balance(Arc<(Vec<Rule>, Arc<PortEndpoints>)>),
}

/// What the rules of a port's endpoints are made of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PortEndpoints {
    /// The name of the Service and its port.
    pub(super) name: Box<str>,
    pub(super) protocol: Protocol,
    /// Whether rules have comments. In large clusters they do not, as with kube-proxy.
    pub(super) comments: bool,
    /// How long a client keeps its endpoint, in seconds.
    pub(super) affinity: Option<u32>,
    pub(super) shared: Arc<Shared>,
    pub(super) backends: Arc<[Backend]>,
}

/// How many rules an endpoint has.
const ENDPOINT_RULES: usize = 2;

impl PortEndpoints {
    /// The chain of one endpoint.
    pub(super) fn chain(&self, backend: &Backend) -> ChainName {
        endpoint_chain_of(&self.name, self.protocol, backend.socket())
    }

    /// A comment that large clusters do without.
    fn spared(&self, comment: impl FnOnce() -> String) -> RuleBuilder {
        let builder = Rule::builder();
        if self.comments { builder.comment(&comment()) } else { builder }
    }

    /// The rules that choose an endpoint: the one that the client had, or one at random.
    fn balance(&self) -> Vec<Rule> {
        let chains: Vec<(&Backend, ChainName)> = self.backends.iter().map(|it| (it, self.chain(it))).collect();
        let comment = |backend: &Backend| format!("{} -> {}", self.name, backend.socket());
        let mut rules = Vec::with_capacity(chains.len());
        if let Some(seconds) = self.affinity {
            for (backend, chain) in &chains {
                let action = RecentAction::Check { seconds, reap: true };
                let recent = Match::Recent(Box::new(Recent { list: listed(chain), action }));
                let builder = self.spared(|| comment(backend)).when(recent);
                rules.push(builder.origin(&backend.origin).jump(chain));
            }
        }
        for (index, (backend, chain)) in chains.iter().enumerate() {
            let number = chains.len() - index;
            let mut matches = self.shared.chance(number);
            if self.comments {
                let builder = Rule::builder().comment(&comment(backend));
                matches = matches.iter().cloned().fold(builder, RuleBuilder::when).conditions();
            }
            let (target, origin) = (Some(Target::Jump(chain.clone())), Some(backend.origin.clone()));
            rules.push(Rule { matches, target, origin });
        }
        rules
    }

    /// The rules of one endpoint.
    fn endpoint(&self, backend: &Backend) -> Vec<Rule> {
        let builder = || self.spared(|| self.name.to_string());
        // An endpoint that is its own client would answer itself.
        let hairpin = builder().source(IpNet::from(backend.address)).origin(&backend.origin).jump(&self.shared.mark);
        let note = self.affinity.map(|_| {
            let recent = Recent { list: listed(&self.chain(backend)), action: RecentAction::Set };
            Match::Recent(Box::new(recent))
        });
        let translation = builder().when_some(note).protocol(self.protocol).origin(&backend.origin);
        vec![hairpin, translation.target(Target::Dnat { address: backend.address, port: Some(backend.port) })]
    }

    /// Whether an endpoint has the same rules in both.
    fn has_same(&self, position: u32, other: &PortEndpoints, other_position: u32) -> bool {
        let PortEndpoints { name, protocol, comments, affinity, shared, backends: _ } = self;
        let backend = |port: &PortEndpoints, position: u32| port.backends.get(position as usize).cloned();
        *name == other.name
            && (*protocol, *comments, *affinity) == (other.protocol, other.comments, other.affinity)
            && *shared == other.shared
            && backend(self, position) == backend(other, other_position)
    }
}

/// The list of the clients of an endpoint has the name of its chain.
fn listed(chain: &ChainName) -> Name {
    (&*chain.text()).into()
}

impl Rules {
    /// Those of an endpoint, by its position.
    pub(super) fn of_endpoint(port: Arc<PortEndpoints>, position: usize) -> Rules {
        // There are fewer endpoints than addresses of a family that would fit.
        Rules(Source::Endpoint(port, u32::try_from(position).unwrap_or(u32::MAX)))
    }

    /// Those of a head, and then those that choose one of the endpoints.
    pub(super) fn of_balance(head: Vec<Rule>, port: Arc<PortEndpoints>) -> Rules {
        Rules(Source::Balance(Arc::new((head, port))))
    }

    /// The rules.
    pub fn list(&self) -> Cow<'_, [Rule]> {
        match &self.0 {
            Source::Listed(rules) => Cow::Borrowed(rules),
            Source::Endpoint(port, position) => {
                let backend = port.backends.get(*position as usize);
                Cow::Owned(backend.map(|backend| port.endpoint(backend)).unwrap_or_default())
            }
            Source::Balance(parts) => {
                let (head, port) = &**parts;
                let mut rules = head.clone();
                rules.extend(port.balance());
                Cow::Owned(rules)
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.0 {
            Source::Listed(rules) => rules.len(),
            Source::Endpoint(port, position) => port.backends.get(*position as usize).map_or(0, |_| ENDPOINT_RULES),
            Source::Balance(parts) => {
                let (head, port) = &**parts;
                let rounds = 1 + usize::from(port.affinity.is_some());
                head.len() + rounds * port.backends.len()
            }
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the kernel holds the same for both.
    pub fn is_same(&self, other: &Rules) -> bool {
        self.is_made_alike(other) || {
            let (rules, others) = (self.list(), other.list());
            rules.len() == others.len() && rules.iter().zip(others.iter()).all(|(rule, other)| rule.is_same(other))
        }
    }

    /// Whether both say the same by what they are made of.
    fn is_made_alike(&self, other: &Rules) -> bool {
        match (&self.0, &other.0) {
            (Source::Listed(rules), Source::Listed(others)) => Arc::ptr_eq(rules, others),
            (Source::Endpoint(port, position), Source::Endpoint(other, other_position)) => {
                port.has_same(*position, other, *other_position)
            }
            (Source::Balance(parts), Source::Balance(others)) => parts == others,
            _ => false,
        }
    }
}

impl PartialEq for Rules {
    fn eq(&self, other: &Rules) -> bool {
        self.is_made_alike(other) || self.list() == other.list()
    }
}

impl Eq for Rules {}

impl Default for Rules {
    fn default() -> Rules {
        Vec::new().into()
    }
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.list().fmt(f)
    }
}

impl From<Vec<Rule>> for Rules {
    fn from(rules: Vec<Rule>) -> Rules {
        Rules(Source::Listed(Arc::new(rules)))
    }
}

impl<const N: usize> From<[Rule; N]> for Rules {
    fn from(rules: [Rule; N]) -> Rules {
        Vec::from(rules).into()
    }
}

impl FromIterator<Rule> for Rules {
    fn from_iter<I: IntoIterator<Item = Rule>>(rules: I) -> Rules {
        rules.into_iter().collect::<Vec<_>>().into()
    }
}

impl Serialize for Rules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.list().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Rules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Rules, D::Error> {
        Vec::deserialize(deserializer).map(Rules::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A large cluster has a hundred thousand of them.
    #[test]
    fn a_chain_is_small() {
        assert_eq!(size_of::<Rules>(), 16);
        assert_eq!(size_of::<super::super::Chain>(), 24);
        assert_eq!(size_of::<super::super::Change>(), 40);
    }
}
