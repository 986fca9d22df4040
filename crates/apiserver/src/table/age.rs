//! Durations as kubectl prints them: two units where they say something, one where they do not.

use serde_json::Value;

use crate::fields::{parse_time, text};

/// A duration in kubectl's words: `45s`, `3m4s`, `17m`, `5h2m`, `3d4h`, `1y20d`.
pub fn human_duration(seconds: i64) -> String {
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{big_unit}") } else { format!("{big}{big_unit}{small}{small_unit}") }
    };
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    let days = hours / 24;
    match seconds {
        ..-1 => "<invalid>".into(),
        // The clocks of two machines may differ by a second.
        -1 => "0s".into(),
        0..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => pair(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

/// How long ago a time was.
pub(super) fn since(time: &str, now_seconds: i64) -> String {
    parse_time(time).map_or_else(|| "<unknown>".into(), |then| human_duration(now_seconds - then))
}

/// The age of an object.
pub(super) fn of(object: &Value, now_seconds: i64) -> String {
    since(text(object, "metadata.creationTimestamp"), now_seconds)
}
