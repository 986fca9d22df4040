//! Names of chains, without memory of their own where there are many.
//!
//! With 10,000 Services of 10 endpoints, 110,000 chains have names of a prefix and 16 characters of Base32. As shared
//! texts they took 48 bytes and an allocation each beside the 16 that they take here.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What names with a hash start with, in the order of texts.
const PREFIXES: [&str; 6] = ["KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-XLB-"];

/// How many characters of the hash a name has: with the prefix it fits the 28 that iptables allows.
const HASH_LENGTH: usize = 16;

/// The longest name with a hash.
const LENGTH_MAX: usize = 9 + HASH_LENGTH;

/// The characters of RFC 4648 §6 in the order of texts, in which digits come first.
const BASE32: &[u8; 32] = b"234567ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// The bits of one character.
const CHARACTER_BITS: usize = 5;

/// The name of a chain. It compares, and is shown, as the text that it is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ChainName(Form);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Form {
    /// A prefix, and the characters behind it as bits. Every name that can be so is so.
    Hashed(u8, [u8; 10]),
    /// Any other. It takes two steps to its text, so that names with a hash are small.
    Text(Arc<String>),
}

/// The text of a name.
#[derive(Debug, Clone, Copy)]
pub struct ChainText<'a>(Text<'a>);

#[derive(Debug, Clone, Copy)]
enum Text<'a> {
    Made([u8; LENGTH_MAX], usize),
    Kept(&'a str),
}

impl ChainName {
    /// The name of a prefix and the first 80 bits of a hash, in Base32.
    pub(super) fn of_hash(prefix: &'static str, hash: [u8; 10]) -> ChainName {
        // Digits stand for the highest numbers in RFC 4648, and for the lowest here.
        let characters = fives(hash).map(|five| (five + 6) % 32);
        match PREFIXES.iter().position(|it| *it == prefix).map(u8::try_from) {
            Some(Ok(prefix)) => ChainName(Form::Hashed(prefix, packed(characters))),
            _ => ChainName(Form::Text(Arc::new(String::from(prefix)))),
        }
    }

    /// Its text.
    pub fn text(&self) -> ChainText<'_> {
        let (prefix, hash) = match &self.0 {
            Form::Hashed(prefix, hash) => (PREFIXES.get(usize::from(*prefix)).copied().unwrap_or_default(), *hash),
            Form::Text(text) => return ChainText(Text::Kept(text)),
        };
        let characters = fives(hash).into_iter().filter_map(|five| BASE32.get(usize::from(five)).copied());
        let mut bytes = [0; LENGTH_MAX];
        bytes.iter_mut().zip(prefix.bytes().chain(characters)).for_each(|(byte, it)| *byte = it);
        ChainText(Text::Made(bytes, prefix.len() + HASH_LENGTH))
    }

    fn hashed(text: &str) -> Option<Form> {
        let (prefix, rest) = PREFIXES.iter().enumerate().find_map(|(position, prefix)| {
            let rest: &[u8; HASH_LENGTH] = text.strip_prefix(prefix)?.as_bytes().try_into().ok()?;
            Some((u8::try_from(position).ok()?, rest))
        })?;
        let mut characters = [0; HASH_LENGTH];
        for (five, character) in characters.iter_mut().zip(rest) {
            *five = u8::try_from(BASE32.iter().position(|it| it == character)?).ok()?;
        }
        Some(Form::Hashed(prefix, packed(characters)))
    }
}

/// Bits in groups of five, the first ones first.
fn fives(bytes: [u8; 10]) -> [u8; HASH_LENGTH] {
    let mut all = bytes.iter().fold(0u128, |all, byte| all << 8 | u128::from(*byte));
    let mut fives = [0; HASH_LENGTH];
    for five in fives.iter_mut().rev() {
        *five = u8::try_from(all & 31).unwrap_or_default();
        all >>= CHARACTER_BITS;
    }
    fives
}

/// Groups of five bits as bytes.
fn packed(fives: [u8; HASH_LENGTH]) -> [u8; 10] {
    let mut all = fives.iter().fold(0u128, |all, five| all << CHARACTER_BITS | u128::from(*five));
    let mut bytes = [0; 10];
    for byte in bytes.iter_mut().rev() {
        *byte = u8::try_from(all & 255).unwrap_or_default();
        all >>= 8;
    }
    bytes
}

impl Deref for ChainText<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        match &self.0 {
            // They are of ASCII.
            Text::Made(bytes, length) => {
                bytes.get(..*length).and_then(|it| str::from_utf8(it).ok()).unwrap_or_default()
            }
            Text::Kept(text) => text,
        }
    }
}

impl From<&str> for ChainName {
    fn from(text: &str) -> ChainName {
        ChainName(ChainName::hashed(text).unwrap_or_else(|| Form::Text(Arc::new(text.to_owned()))))
    }
}

impl Ord for ChainName {
    fn cmp(&self, other: &ChainName) -> Ordering {
        match (&self.0, &other.0) {
            (Form::Hashed(prefix, hash), Form::Hashed(other_prefix, other_hash)) => {
                (prefix, hash).cmp(&(other_prefix, other_hash))
            }
            _ => self.text().cmp(&*other.text()),
        }
    }
}

impl PartialOrd for ChainName {
    fn partial_cmp(&self, other: &ChainName) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq<str> for ChainName {
    fn eq(&self, other: &str) -> bool {
        *self.text() == *other
    }
}

impl PartialEq<&str> for ChainName {
    fn eq(&self, other: &&str) -> bool {
        self == *other
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text())
    }
}

impl fmt::Debug for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.text(), f)
    }
}

impl Serialize for ChainName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text())
    }
}

impl<'de> Deserialize<'de> for ChainName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ChainName, D::Error> {
        String::deserialize(deserializer).map(|text| text.as_str().into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::IPTABLES_CHAIN_PREFIXES;

    #[test]
    fn names_are_small_and_their_prefixes_those_of_the_layout() {
        assert_eq!(size_of::<ChainName>(), 16);
        let mut prefixes = IPTABLES_CHAIN_PREFIXES;
        prefixes.sort_unstable();
        assert_eq!(prefixes, PREFIXES);
        assert!(BASE32.is_sorted() && PREFIXES.iter().all(|prefix| prefix.len() + HASH_LENGTH <= LENGTH_MAX));
    }

    /// Names with a hash, and those that are almost such.
    fn text() -> impl Strategy<Value = String> {
        let prefix = prop_oneof![prop::sample::select(&PREFIXES[..]), Just("KUBE-"), Just("")];
        let rest = prop_oneof![4 => "[A-Z2-7]{16}", 1 => "[A-Z2-7]{15,17}", 1 => "[A-Z0-9a-z]{16}", 1 => "\\PC{0,9}"];
        (prefix, rest).prop_map(|(prefix, rest)| format!("{prefix}{rest}"))
    }

    proptest! {
        #[test]
        fn a_name_is_its_text(one in text(), other in text(), again in any::<bool>()) {
            let other = if again { one.clone() } else { other };
            let (name, other_name) = (ChainName::from(one.as_str()), ChainName::from(other.as_str()));
            prop_assert_eq!(&*name.text(), one.as_str());
            prop_assert_eq!(name.to_string(), one.clone());
            prop_assert_eq!(&name, one.as_str());
            prop_assert_eq!(name.cmp(&other_name), one.cmp(&other));
            prop_assert_eq!(name == other_name, one == other);
            let json = serde_json::to_string(&name).unwrap();
            prop_assert_eq!(&json, &serde_json::to_string(&one).unwrap());
            prop_assert_eq!(serde_json::from_str::<ChainName>(&json).unwrap(), name);
        }

        #[test]
        fn a_hash_makes_the_name_that_its_text_makes(prefix in prop::sample::select(&PREFIXES[..]), hash in any::<[u8; 10]>()) {
            let name = ChainName::of_hash(prefix, hash);
            prop_assert_eq!(ChainName::from(&*name.text()), name);
        }
    }
}
