//! Points in time as Go prints them, for whoever reads the health of a kube-proxy.

use std::time::{SystemTime, UNIX_EPOCH};

/// Days from 0000-03-01, where 400-year cycles begin, to 1970-01-01.
const DAYS_TO_EPOCH: u64 = 719_468;

/// Days of 400 years.
const DAYS_OF_CYCLE: u64 = 146_097;

/// A time as Go's `Time.String` prints it in UTC; no time is Go's zero time.
pub(super) fn render(time: Option<SystemTime>) -> String {
    let Some(since) = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok()) else {
        return "0001-01-01 00:00:00 +0000 UTC".to_owned();
    };
    let (year, month, day) = civil(since.as_secs() / 86_400);
    let second = since.as_secs() % 86_400;
    let fraction = match since.subsec_nanos() {
        0 => String::new(),
        nanoseconds => format!(".{nanoseconds:09}").trim_end_matches('0').to_owned(),
    };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}{fraction} +0000 UTC")
}

/// Year, month and day of a day since 1970, in the Gregorian calendar. Years begin in March here, so that the
/// leap day is their last (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn civil(days_since_epoch: u64) -> (u64, u64, u64) {
    let days = days_since_epoch + DAYS_TO_EPOCH;
    let (cycle, day) = (days / DAYS_OF_CYCLE, days % DAYS_OF_CYCLE);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, is_next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (cycle * 400 + year + is_next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_read_as_gos() {
        let at = |seconds, nanoseconds| render(Some(UNIX_EPOCH + Duration::new(seconds, nanoseconds)));
        assert_eq!(render(None), "0001-01-01 00:00:00 +0000 UTC");
        assert_eq!(at(0, 0), "1970-01-01 00:00:00 +0000 UTC");
        assert_eq!(at(951_782_399, 500_000_000), "2000-02-28 23:59:59.5 +0000 UTC");
        assert_eq!(at(951_782_400, 0), "2000-02-29 00:00:00 +0000 UTC");
        assert_eq!(at(1_795_185_622, 123_456_789), "2026-11-20 14:40:22.123456789 +0000 UTC");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01 00:00:00 +0000 UTC");
    }
}
