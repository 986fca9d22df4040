//! The kernel's settings of connection tracking, as kube-proxy sets them: the table only grows, and what has
//! the value already is left alone.

use std::time::Duration;

use portolan_kernel::sysctl;

use super::options::{ConntrackOptions, Note};

const MAX: &str = "net/netfilter/nf_conntrack_max";

/// Buckets of the hash table; the kernel's own ratio is four connections for each.
const BUCKETS: &str = "/sys/module/nf_conntrack/parameters/hashsize";

/// Connections for each bucket.
const PER_BUCKET: u64 = 4;

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    /// The field of the configuration.
    field: &'static str,
    /// The path below `/proc/sys`.
    path: &'static str,
    value: u64,
    /// Whether a greater value is as good.
    is_least: bool,
}

/// Sets what is asked for. What cannot be set is noted.
pub(super) fn apply(options: &ConntrackOptions) -> Vec<Note> {
    let mut notes = Vec::new();
    for setting in settings(options, processors()) {
        if let Err(reason) = set(&setting) {
            let field = format!("conntrack.{}", setting.field);
            notes.push(Note::new(&field, reason, "set it on the host, before the agent starts (sysctl)"));
        }
    }
    notes
}

fn settings(options: &ConntrackOptions, processors: u32) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut add = |field, path, value: Option<u64>, is_least| {
        settings.extend(value.map(|value| Setting { field, path, value, is_least }));
    };
    let most = options.max_per_core.map(|each| (u64::from(each) * u64::from(processors)).max(options.min.into()));
    let seconds = |duration: Option<Duration>| duration.map(|it| it.as_secs());
    add("maxPerCore", MAX, most, true);
    let path = "net/netfilter/nf_conntrack_tcp_timeout_established";
    add("tcpEstablishedTimeout", path, seconds(options.tcp_established_timeout), false);
    let path = "net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    add("tcpCloseWaitTimeout", path, seconds(options.tcp_close_wait_timeout), false);
    let liberal = options.tcp_be_liberal.then_some(1);
    add("tcpBeLiberal", "net/netfilter/nf_conntrack_tcp_be_liberal", liberal, false);
    add("udpTimeout", "net/netfilter/nf_conntrack_udp_timeout", seconds(options.udp_timeout), false);
    let path = "net/netfilter/nf_conntrack_udp_timeout_stream";
    add("udpStreamTimeout", path, seconds(options.udp_stream_timeout), false);
    settings
}

fn set(setting: &Setting) -> Result<(), String> {
    let now = sysctl::read(setting.path).map_err(|error| error.to_string())?;
    let is_there = |now: u64| now == setting.value || setting.is_least && now > setting.value;
    if !now.parse().is_ok_and(is_there) {
        sysctl::write(setting.path, &setting.value.to_string()).map_err(|error| error.to_string())?;
    }
    if setting.path == MAX { grow_buckets(setting.value / PER_BUCKET) } else { Ok(()) }
}

/// A table of many connections and few buckets would be slow.
fn grow_buckets(wanted: u64) -> Result<(), String> {
    let Ok(now) = std::fs::read_to_string(BUCKETS) else {
        // Another kernel's name for it, or a container without /sys: the limit itself is set.
        return Ok(());
    };
    if now.trim().parse().is_ok_and(|now: u64| now >= wanted) {
        return Ok(());
    }
    std::fs::write(BUCKETS, wanted.to_string()).map_err(|error| format!("cannot set {BUCKETS} to {wanted}: {error}"))
}

/// The machine's processors, whatever share of them the agent has.
fn processors() -> u32 {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let counted = online.and_then(|text| count_of(text.trim()));
    counted.unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
    })
}

/// How many numbers a list such as `0-3,8` has.
fn count_of(list: &str) -> Option<u32> {
    let mut count: u32 = 0;
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(options: &ConntrackOptions) -> Vec<(&'static str, u64)> {
        settings(options, 4).into_iter().map(|setting| (setting.field, setting.value)).collect()
    }

    #[test]
    fn the_table_has_room_for_each_processor_and_at_least_the_minimum() {
        let options = |max_per_core, min| ConntrackOptions { max_per_core, min, ..ConntrackOptions::default() };
        assert_eq!(values(&options(Some(32_768), 131_072)), [("maxPerCore", 131_072)]);
        assert_eq!(values(&options(Some(65_536), 131_072)), [("maxPerCore", 262_144)]);
        assert_eq!(values(&options(Some(1), 131_072)), [("maxPerCore", 131_072)]);
        assert_eq!(values(&options(None, 131_072)), [], "the minimum counts beside maxPerCore only");
    }

    #[test]
    fn only_what_is_given_is_set() {
        let options = ConntrackOptions {
            tcp_be_liberal: true,
            udp_stream_timeout: Some(Duration::from_mins(5)),
            ..ConntrackOptions::default()
        };
        assert_eq!(values(&options), [("tcpBeLiberal", 1), ("udpStreamTimeout", 300)]);
    }

    #[test]
    fn processors_are_counted() {
        assert_eq!([count_of("0"), count_of("0-3"), count_of("0-3,8,10-11")], [Some(1), Some(4), Some(7)]);
        assert_eq!([count_of(""), count_of("3-0"), count_of("0-4294967295")], [None, None, None]);
        assert!(processors() >= 1);
    }

    proptest! {
        #[test]
        fn any_list_is_read_or_refused(list in "[0-9,-]{0,20}") {
            let _ = count_of(&list);
        }
    }
}
