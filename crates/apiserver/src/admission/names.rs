//! The forms of names: RFC 1123 labels and subdomains, label keys and values, port names.

pub(super) const LABEL_FORM: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character, at most 63 of them";
pub(super) const LABEL_1035_FORM: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character, at most 63 of them";
pub(super) const SUBDOMAIN_FORM: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character, at most 253 of them";
pub(super) const KEY_FORM: &str = "a qualified name must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character, at most 63 of them, with an optional DNS subdomain prefix and '/'";
pub(super) const VALUE_FORM: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character, at most 63 of them";
pub(super) const PORT_NAME_FORM: &str = "must be at most 15 lower case alphanumeric characters or '-', with at least one letter, no '--', and start and end with an alphanumeric character";

/// A lower-case RFC 1123 label of at most 63 characters.
pub fn is_dns_label(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(is_inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// The same, beginning with a letter (RFC 1035 §2.3.1).
pub(super) fn is_dns_1035_label(text: &str) -> bool {
    is_dns_label(text) && text.starts_with(|first: char| first.is_ascii_lowercase())
}

/// Labels joined with dots, at most 253 characters.
pub fn is_dns_subdomain(text: &str) -> bool {
    // Only the whole is bounded in Kubernetes, not each part.
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_part =
        |part: &str| !part.is_empty() && part.bytes().all(is_inner) && !part.starts_with('-') && !part.ends_with('-');
    text.len() <= 253 && text.split('.').all(is_part)
}

/// A label's key: a name, with an optional DNS prefix before a slash.
pub fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(prefix) && is_qualified(name),
        None => is_qualified(key),
    }
}

/// A label's value: empty, or at most 63 letters, digits, `-`, `_` and `.` between letters or digits.
pub fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_qualified(value)
}

/// The name of a port (RFC 6335 §5.1).
pub(super) fn is_port_name(text: &str) -> bool {
    text.len() <= 15 && is_dns_label(text) && !text.contains("--") && text.bytes().any(|byte| byte.is_ascii_lowercase())
}

fn is_qualified(text: &str) -> bool {
    let bytes = text.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    bytes.len() <= 63
        && ends.iter().all(|byte| byte.is_some_and(u8::is_ascii_alphanumeric))
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bounds_of_names() {
        assert!(is_dns_label(&"a".repeat(63)) && !is_dns_label(&"a".repeat(64)));
        assert!(!is_dns_label("-a") && !is_dns_label("a-") && !is_dns_label("A") && !is_dns_label(""));
        assert!(is_dns_subdomain("a.b-c.9") && !is_dns_subdomain("a..b") && !is_dns_subdomain(&"a".repeat(254)));
        assert!(is_label_key("example.com/Name_x.1") && !is_label_key("/x") && !is_label_key("a/b/c"));
        assert!(is_label_value("") && is_label_value("A.b_c-1") && !is_label_value(".a"));
        assert!(is_port_name("http-1") && !is_port_name("80") && !is_port_name("sixteen-letters-"));
        assert!(!is_dns_1035_label("1a"));
    }
}
