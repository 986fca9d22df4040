//! `cache`: what upstreams said, for as long as they allow.
//!
//! **Promise.** An answer is kept no longer than the shortest time to live in it, and at most
//! [`CACHE_POSITIVE_MAX`]; a denial no longer than its SOA record allows (RFC 2308 §5), at most
//! [`CACHE_NEGATIVE_MAX`], and not at all without one; a failure, an upstream's SERVFAIL or the silence
//! of all, for [`CACHE_FAILURE`] (RFC 9520 §3), so that clients which ask again and again do not flood
//! servers in trouble. Times to live go down while an answer is kept. At most [`CACHE_ENTRIES_MAX`]
//! answers are kept, each at most one message long: then the oldest goes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::chain::{Context, Plugin, Step};
use crate::limits::{CACHE_ENTRIES_MAX, CACHE_FAILURE, CACHE_NEGATIVE_MAX, CACHE_POSITIVE_MAX};
use crate::metrics::{Metrics, increment, set};
use crate::wire::{Question, Record, Response, ResponseCode};

/// The plugin.
pub const PLUGIN: Plugin = Plugin { name: "cache", answer };

fn answer(question: &Question, context: &Context<'_>) -> Step {
    match context.cache.get(question, context.now, context.metrics) {
        Some(response) => Step::Answer(response),
        None => Step::Next,
    }
}

/// Answers by question.
#[derive(Debug)]
pub struct Cache {
    kept: Mutex<Kept>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Kept {
    entries: HashMap<Question, Entry>,
    /// Every key of `entries` once, the oldest first.
    order: VecDeque<Question>,
}

#[derive(Debug)]
struct Entry {
    response: Arc<Response>,
    stored: Instant,
    lifetime: Duration,
}

impl Default for Cache {
    fn default() -> Cache {
        Cache::with_capacity(CACHE_ENTRIES_MAX)
    }
}

impl Cache {
    /// A cache of at most so many answers.
    pub fn with_capacity(capacity: usize) -> Cache {
        Cache { kept: Mutex::default(), capacity }
    }

    /// The answer to a question, if it is still good.
    pub fn get(&self, question: &Question, now: Instant, metrics: &Metrics) -> Option<Response> {
        let hit = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.entries.get(question).and_then(|entry| {
                let age = now.saturating_duration_since(entry.stored);
                (age < entry.lifetime).then(|| (entry.response.clone(), age, entry.lifetime))
            })
        };
        let Some((response, age, lifetime)) = hit else {
            increment(&metrics.cache_misses);
            return None;
        };
        increment(if is_denial(&response) { &metrics.cache_hits_denial } else { &metrics.cache_hits_success });
        let mut response = (*response).clone();
        let (age, left) = (seconds(age), seconds(lifetime.saturating_sub(age)));
        for record in response.records_mut() {
            // Never more than is left here: others would keep it for longer than we do.
            record.set_ttl(record.ttl().saturating_sub(age).min(left));
        }
        Some(response)
    }

    /// Keeps an answer, if it may be kept.
    pub fn insert(&self, question: &Question, response: &Response, now: Instant, metrics: &Metrics) {
        let Some(lifetime) = lifetime(response) else { return };
        let entry = Entry { response: Arc::new(response.clone()), stored: now, lifetime };
        let mut guard = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = &mut *guard;
        if kept.entries.insert(question.clone(), entry).is_none() {
            kept.order.push_back(question.clone());
        }
        while kept.entries.len() > self.capacity {
            let Some(oldest) = kept.order.pop_front() else { break };
            kept.entries.remove(&oldest);
            increment(&metrics.cache_evictions);
        }
        set(&metrics.cache_entries, kept.entries.len() as u64);
    }
}

fn is_denial(response: &Response) -> bool {
    response.code != ResponseCode::NO_ERROR || response.answers.is_empty()
}

/// How long an answer may be kept; `None` for one that may not.
fn lifetime(response: &Response) -> Option<Duration> {
    let lifetime = match response.code {
        ResponseCode::SERVER_FAILURE => CACHE_FAILURE,
        ResponseCode::NO_ERROR if !response.answers.is_empty() => {
            let shortest = response.records().map(Record::ttl).min().unwrap_or(0);
            Duration::from_secs(u64::from(shortest)).min(CACHE_POSITIVE_MAX)
        }
        ResponseCode::NO_ERROR | ResponseCode::NO_SUCH_NAME => {
            let allowed = response.authority.iter().find_map(Record::denial_ttl)?;
            let shortest = response.records().map(Record::ttl).min().unwrap_or(0).min(allowed);
            Duration::from_secs(u64::from(shortest)).min(CACHE_NEGATIVE_MAX)
        }
        _ => return None,
    };
    (!lifetime.is_zero()).then_some(lifetime)
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use portolan_intent::names::{Record as NameRecord, RecordData};
    use portolan_net::Origin;

    use super::*;
    use crate::wire::RecordType;

    fn question(name: &str) -> Question {
        Question { name: name.parse().unwrap(), record_type: RecordType::A, dnssec_ok: false, checking_disabled: false }
    }

    fn record(data: RecordData, ttl: u32) -> Record {
        let record = NameRecord { name: "example.org".parse().unwrap(), data, origin: Origin::configuration("a test") };
        Record::new(&record, ttl).unwrap()
    }

    fn address(ttl: u32) -> Response {
        let answers = vec![record(RecordData::Address("192.0.2.1".parse().unwrap()), ttl)];
        Response { answers, ..Response::empty(ResponseCode::NO_ERROR) }
    }

    fn denial(ttl: u32) -> Response {
        let soa = RecordData::Authority {
            primary: "ns.example.org".parse().unwrap(),
            mailbox: "a.example.org".parse().unwrap(),
            serial: 1,
        };
        Response { authority: vec![record(soa, ttl)], ..Response::empty(ResponseCode::NO_SUCH_NAME) }
    }

    /// The times at which an answer is still there, of those asked.
    fn lives(response: &Response, seconds: u64) -> bool {
        let (cache, metrics, start) = (Cache::default(), Metrics::default(), Instant::now());
        cache.insert(&question("example.org"), response, start, &metrics);
        cache.get(&question("example.org"), start + Duration::from_secs(seconds), &metrics).is_some()
    }

    #[test]
    fn an_answer_lives_as_long_as_its_records_and_no_longer_than_the_cap() {
        assert!(lives(&address(30), 29) && !lives(&address(30), 30));
        assert!(lives(&address(90_000), 3599) && !lives(&address(90_000), 3600));
        assert!(!lives(&address(0), 0));
    }

    #[test]
    fn a_denial_lives_as_long_as_its_soa_record_says() {
        assert!(lives(&denial(60), 59) && !lives(&denial(60), 60));
        assert!(lives(&denial(7200), 1799) && !lives(&denial(7200), 1800));
        assert!(!lives(&Response::empty(ResponseCode::NO_SUCH_NAME), 0), "a denial without SOA is not kept");
    }

    #[test]
    fn a_failure_lives_shortly_and_a_refusal_not_at_all() {
        let failure = Response::empty(ResponseCode::SERVER_FAILURE);
        assert!(lives(&failure, 4) && !lives(&failure, 5));
        assert!(!lives(&Response::empty(ResponseCode::REFUSED), 0));
    }

    #[test]
    fn times_to_live_go_down() {
        let (cache, metrics, start) = (Cache::default(), Metrics::default(), Instant::now());
        cache.insert(&question("example.org"), &address(30), start, &metrics);
        let later = cache.get(&question("example.org"), start + Duration::from_secs(12), &metrics).unwrap();
        assert_eq!(later.answers[0].ttl(), 18);
        assert_eq!(metrics.cache_hits_success.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_oldest_goes_first_at_the_bound() {
        let (cache, metrics, now) = (Cache::with_capacity(2), Metrics::default(), Instant::now());
        for name in ["a", "b", "a", "c"] {
            cache.insert(&question(name), &address(30), now, &metrics);
        }
        let there = ["a", "b", "c"].map(|name| cache.get(&question(name), now, &metrics).is_some());
        assert_eq!(there, [false, true, true]);
        assert_eq!(metrics.cache_evictions.load(Ordering::Relaxed), 1);
        assert_eq!(metrics.cache_entries.load(Ordering::Relaxed), 2);
    }
}
