//! Domain names: sequences of labels, lower-cased, since DNS compares them without regard to case
//! (RFC 4343).

use std::fmt;
use std::str::FromStr;

/// The longest label, in bytes (RFC 1035 §2.3.4).
const LABEL_LENGTH_MAX: usize = 63;

/// The longest name in bytes, without the root label (RFC 1035 §2.3.4).
const NAME_LENGTH_MAX: usize = 254;

/// A domain name, as the wire carries it: each label after its length, without the root label.
///
/// Labels are bytes: a label may hold a dot or any other byte, and is then unlike every name that
/// the cluster has. The root is the name without labels.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainName(Vec<u8>);

/// Why a text or a list of labels is no domain name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDomainName {
    /// A label is empty or too long.
    #[error("a label of {0} bytes: use 1 to {LABEL_LENGTH_MAX} (RFC 1035 §2.3.4)")]
    LabelLength(usize),
    /// The name is too long.
    #[error("a name of more than {NAME_LENGTH_MAX} bytes (RFC 1035 §2.3.4)")]
    NameLength,
}

impl DomainName {
    /// The name made of these labels, the leftmost first.
    pub fn from_labels<'a>(labels: impl IntoIterator<Item = &'a [u8]>) -> Result<DomainName, InvalidDomainName> {
        let mut bytes = Vec::with_capacity(64);
        for label in labels {
            push(&mut bytes, label)?;
        }
        if bytes.len() > NAME_LENGTH_MAX { Err(InvalidDomainName::NameLength) } else { Ok(DomainName(bytes)) }
    }

    /// The name made of these labels followed by this name.
    pub fn under(&self, labels: &[&str]) -> Result<DomainName, InvalidDomainName> {
        let mut bytes = Vec::with_capacity(64);
        for label in labels {
            push(&mut bytes, label.as_bytes())?;
        }
        bytes.extend_from_slice(&self.0);
        if bytes.len() > NAME_LENGTH_MAX { Err(InvalidDomainName::NameLength) } else { Ok(DomainName(bytes)) }
    }

    /// The labels, the leftmost first.
    pub fn labels(&self) -> Labels<'_> {
        Labels(&self.0)
    }

    /// The labels to the left of `zone`, if this name is the zone or lies within it.
    pub fn within<'a>(&'a self, zone: &DomainName) -> Option<Labels<'a>> {
        let head = self.0.strip_suffix(zone.0.as_slice())?;
        // The same bytes may end in the middle of a label: the walk must end where the head does.
        let mut offset = 0;
        while offset < head.len() {
            offset += 1 + usize::from(head[offset]);
        }
        (offset == head.len()).then_some(Labels(head))
    }

    /// Whether this is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

fn push(bytes: &mut Vec<u8>, label: &[u8]) -> Result<(), InvalidDomainName> {
    if label.is_empty() || label.len() > LABEL_LENGTH_MAX {
        return Err(InvalidDomainName::LabelLength(label.len()));
    }
    bytes.push(label.len() as u8);
    bytes.extend(label.iter().map(u8::to_ascii_lowercase));
    Ok(())
}

/// The labels of a name, the leftmost first.
#[derive(Debug, Clone)]
pub struct Labels<'a>(&'a [u8]);

impl<'a> Iterator for Labels<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.0.split_first()?;
        let (label, rest) = rest.split_at_checked(usize::from(*length))?;
        self.0 = rest;
        Some(label)
    }
}

impl FromStr for DomainName {
    type Err = InvalidDomainName;

    /// Reads dotted text; a dot at the end is allowed and means nothing.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Ok(DomainName::default());
        }
        DomainName::from_labels(text.split('.').map(str::as_bytes))
    }
}

impl fmt::Display for DomainName {
    /// Absolute, with the dot at the end; other bytes than letters, digits, `-` and `_` are escaped
    /// (RFC 1035 §5.1).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            return f.write_str(".");
        }
        for label in self.labels() {
            for byte in label {
                match byte {
                    b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => write!(f, "{}", char::from(*byte))?,
                    other => write!(f, "\\{other:03}")?,
                }
            }
            f.write_str(".")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_labels_are_kept_or_refused(labels in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..70), 0..8)) {
            if let Ok(name) = DomainName::from_labels(labels.iter().map(Vec::as_slice)) {
                let lower: Vec<Vec<u8>> = labels.iter().map(|label| label.to_ascii_lowercase()).collect();
                prop_assert_eq!(name.labels().map(<[u8]>::to_vec).collect::<Vec<_>>(), lower);
            }
        }

        #[test]
        fn text_never_panics(text: String) {
            let _ = text.parse::<DomainName>();
        }
    }

    #[test]
    fn a_name_lies_within_its_zone_at_a_label_only() {
        let zone: DomainName = "Cluster.Local".parse().unwrap();
        let name: DomainName = "a.b.cluster.local.".parse().unwrap();
        assert_eq!(name.within(&zone).unwrap().collect::<Vec<_>>(), [b"a", b"b"]);
        assert_eq!(zone.within(&zone).unwrap().count(), 0);
        assert!("xcluster.local".parse::<DomainName>().unwrap().within(&zone).is_none());
        // A label that holds the bytes of the zone is not the zone.
        let inside = DomainName::from_labels([&b"a\x07cluster\x05local"[..]]).unwrap();
        assert!(inside.within(&zone).is_none());
        assert_eq!(inside.to_string(), "a\\007cluster\\005local.");
    }
}
