//! Builds rules whose parts stand in the order in which `iptables-save` prints them.

use std::sync::Arc;

use ipnet::IpNet;
use portolan_net::{Origin, Port, Protocol};

use super::{ChainName, Match, Rule, Target};

/// The longest comment in bytes (`XT_MAX_COMMENT_LEN`, less the zero at its end).
pub const COMMENT_LENGTH_MAX: usize = 255;

/// Builds a rule.
#[derive(Debug, Clone, Default)]
pub struct RuleBuilder {
    matches: Vec<Match>,
    origin: Option<Origin>,
}

impl RuleBuilder {
    /// Adds a condition. Conditions of the head find their place; the others stay in the order given.
    #[must_use]
    pub fn when(mut self, condition: Match) -> RuleBuilder {
        self.matches.push(condition);
        self
    }

    /// Adds a condition, if there is one.
    #[must_use]
    pub fn when_some(mut self, condition: Option<Match>) -> RuleBuilder {
        self.matches.extend(condition);
        self
    }

    /// The source is in the prefix.
    #[must_use]
    pub fn source(self, prefix: IpNet) -> RuleBuilder {
        self.when(Match::Source { prefix, inside: true })
    }

    /// The destination is in the prefix.
    #[must_use]
    pub fn destination(self, prefix: IpNet) -> RuleBuilder {
        self.when(Match::Destination { prefix, inside: true })
    }

    /// The protocol, as `-p tcp -m tcp`.
    #[must_use]
    pub fn protocol(self, protocol: Protocol) -> RuleBuilder {
        self.when(Match::Protocol { protocol, inside: true }).when(Match::Transport { protocol, port: None })
    }

    /// The protocol and the destination port, as `-p tcp -m tcp --dport 80`.
    #[must_use]
    pub fn port(self, protocol: Protocol, port: Port) -> RuleBuilder {
        self.when(Match::Protocol { protocol, inside: true }).when(Match::Transport { protocol, port: Some(port) })
    }

    /// A comment; one that is too long for the kernel is cut.
    #[must_use]
    pub fn comment(self, comment: &str) -> RuleBuilder {
        let mut end = comment.len().min(COMMENT_LENGTH_MAX);
        while !comment.is_char_boundary(end) {
            end -= 1;
        }
        self.when(Match::Comment(comment.get(..end).unwrap_or_default().into()))
    }

    /// What causes the rule.
    #[must_use]
    pub fn origin(mut self, origin: &Origin) -> RuleBuilder {
        self.origin = Some(origin.clone());
        self
    }

    /// The rule that jumps to a chain.
    pub fn jump(self, chain: &ChainName) -> Rule {
        self.target(Target::Jump(chain.clone()))
    }

    /// The conditions alone, to be shared by rules.
    pub fn conditions(self) -> Arc<[Match]> {
        self.without_target().matches
    }

    /// The rule with a target.
    pub fn target(self, target: Target) -> Rule {
        Rule { target: Some(target), ..self.without_target() }
    }

    /// The rule without a target.
    pub fn without_target(mut self) -> Rule {
        self.matches.sort_by_key(Match::place);
        Rule { matches: self.matches.into(), target: None, origin: self.origin }
    }
}
