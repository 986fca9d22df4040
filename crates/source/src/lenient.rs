//! Reads JSON that may have any shape without failing.
//!
//! A list is one document: were a single field of a single object of the wrong type an error, one
//! bad object would keep the whole table from ever being in sync. So each part is read on its own,
//! and a part of the wrong shape becomes [`Leaf::Bad`], which the conversion reports. Fields that
//! nobody reads are skipped while parsing and never held.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A scalar: not there (or null), of the right type, or of another.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) enum Leaf<T> {
    /// Not there, or null.
    #[default]
    Absent,
    /// As it should be.
    Good(T),
    /// Of another type: the value as it is written.
    Bad(String),
}

impl<T> Leaf<T> {
    /// The value; anything else is as if it were not there.
    pub(crate) fn good(self) -> Option<T> {
        match self {
            Leaf::Good(value) => Some(value),
            Leaf::Absent | Leaf::Bad(_) => None,
        }
    }

    /// The value, by reference.
    pub(crate) fn get(&self) -> Option<&T> {
        match self {
            Leaf::Good(value) => Some(value),
            Leaf::Absent | Leaf::Bad(_) => None,
        }
    }

    /// Whether it is there at all.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Leaf::Absent)
    }
}

impl Leaf<String> {
    /// The text; empty where there is none.
    pub(crate) fn text(&self) -> &str {
        self.get().map_or("", String::as_str)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Leaf<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        if value.is_null() {
            return Ok(Leaf::Absent);
        }
        Ok(T::deserialize(&value).map_or_else(|_| Leaf::Bad(shorten(&value.to_string())), Leaf::Good))
    }
}

/// An object whose own fields are lenient. What is no object reads as an empty one.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Part<T>(pub(crate) T);

/// A list whose elements are lenient. What is no list reads as an empty one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct List<T>(pub(crate) Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        List(Vec::new())
    }
}

/// The text values of a map; other values are left out.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Texts(pub(crate) BTreeMap<String, String>);

impl Texts {
    /// The text under a key.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

impl<'de, T: Deserialize<'de> + Default> Deserialize<'de> for Part<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Anything::<OfPart<T>>(PhantomData)).map(Part)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Anything::<OfList<T>>(PhantomData)).map(List)
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Anything::<OfTexts>(PhantomData)).map(Texts)
    }
}

/// What to make of a map or of a list; every other shape gives the default.
trait Shape<'de> {
    type Output: Default;

    fn from_map<A: MapAccess<'de>>(mut map: A) -> Result<Self::Output, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Self::Output::default())
    }

    fn from_sequence<A: SeqAccess<'de>>(mut sequence: A) -> Result<Self::Output, A::Error> {
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self::Output::default())
    }
}

struct OfPart<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de> + Default> Shape<'de> for OfPart<T> {
    type Output = T;

    fn from_map<A: MapAccess<'de>>(map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

struct OfList<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Shape<'de> for OfList<T> {
    type Output = Vec<T>;

    fn from_sequence<A: SeqAccess<'de>>(mut sequence: A) -> Result<Vec<T>, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element()? {
            elements.push(element);
        }
        Ok(elements)
    }
}

struct OfTexts;

impl<'de> Shape<'de> for OfTexts {
    type Output = BTreeMap<String, String>;

    fn from_map<A: MapAccess<'de>>(mut map: A) -> Result<Self::Output, A::Error> {
        let mut texts = BTreeMap::new();
        while let Some((key, value)) = map.next_entry::<String, Leaf<String>>()? {
            if let Some(value) = value.good() {
                texts.insert(key, value);
            }
        }
        Ok(texts)
    }
}

struct Anything<S>(PhantomData<S>);

impl<'de, S: Shape<'de>> Visitor<'de> for Anything<S> {
    type Value = S::Output;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        S::from_map(map)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, sequence: A) -> Result<Self::Value, A::Error> {
        S::from_sequence(sequence)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(S::Output::default())
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(S::Output::default())
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(S::Output::default())
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(S::Output::default())
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(S::Output::default())
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(S::Output::default())
    }
}

/// A value for a message: the whole of it helps nobody when it is long.
pub(crate) fn shorten(text: &str) -> String {
    const LENGTH_MAX: usize = 80;
    match text.char_indices().nth(LENGTH_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Port {
        port: Leaf<i64>,
        name: Leaf<String>,
    }

    fn read(text: &str) -> List<Part<Port>> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn one_bad_element_leaves_the_others() {
        let list = read(r#"[{"port": 80, "name": null}, "eighty", {"port": "eighty", "ignored": [1, {}]}]"#);
        assert_eq!(list.0.len(), 3);
        assert_eq!(list.0[0].0, Port { port: Leaf::Good(80), name: Leaf::Absent });
        assert_eq!(list.0[1].0, Port::default());
        assert_eq!(list.0[2].0.port, Leaf::Bad("\"eighty\"".into()));
    }

    #[test]
    fn every_other_shape_reads_as_an_empty_list() {
        for text in ["null", "true", "1", "-1", "1.5", "\"text\"", "{\"a\": {\"b\": []}}", "[]"] {
            assert_eq!(read(text).0.len(), 0, "{text}");
        }
    }

    #[test]
    fn texts_leave_out_what_is_no_text() {
        let texts: Texts = serde_json::from_str(r#"{"a": "1", "b": 2, "c": null, "d": {}}"#).unwrap();
        assert_eq!(texts.0.into_iter().collect::<Vec<_>>(), [("a".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn long_values_are_shortened_between_characters() {
        let text = "é".repeat(200);
        assert_eq!(shorten(&text).chars().count(), 81);
        assert_eq!(shorten("short"), "short");
    }
}
