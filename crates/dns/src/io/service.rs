//! One query, from bytes to bytes: the chain, and around it the counters and the guard against
//! panics.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use portolan_intent::names::Names;
use portolan_net::Family;
use portolan_state::Snapshot;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::upstream::Upstreams;
use crate::Settings;
use crate::chain::{self, Context, Outcome};
use crate::limits::{FORWARDS_MAX, MESSAGE_LENGTH_MAX};
use crate::metrics::{Metrics, Transport, increment};
use crate::plugins::cache::Cache;
use crate::wire::{self, Query, Question, Record, Request, Response, ResponseCode};

/// The tables, and the names brought up to them.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) snapshot: Snapshot,
    pub(super) names: Names,
}

/// What all tasks of the server share.
#[derive(Debug)]
pub(super) struct Service {
    settings: Settings,
    tables: RwLock<Arc<Tables>>,
    cache: Cache,
    upstreams: Upstreams,
    forwards: Arc<Semaphore>,
    pub(super) metrics: Arc<Metrics>,
    random: Random,
}

/// Numbers that cannot be guessed: a keyed hash (SipHash) of a counter, whose key the standard
/// library takes from the operating system.
#[derive(Debug, Default)]
pub(super) struct Random {
    key: RandomState,
    count: AtomicU64,
}

impl Random {
    pub(super) fn next(&self) -> u64 {
        self.key.hash_one(self.count.fetch_add(1, Ordering::Relaxed))
    }
}

/// What becomes of bytes from a client.
pub(super) enum Handled {
    /// The answer is in the buffer.
    Answered,
    /// There is no answer.
    Ignored,
    /// An upstream must be asked.
    Pending(Box<Pending>),
}

/// A query that waits for an upstream.
pub(super) struct Pending {
    query: Box<Query>,
    question: Question,
    aliases: Vec<Record>,
    limit: usize,
    started: Instant,
    /// One of the places for queries that wait.
    _place: OwnedSemaphorePermit,
}

impl Service {
    pub(super) fn new(settings: Settings, tables: Tables) -> Service {
        Service {
            upstreams: Upstreams::new(&settings.upstreams),
            settings,
            tables: RwLock::new(Arc::new(tables)),
            cache: Cache::default(),
            forwards: Arc::new(Semaphore::new(FORWARDS_MAX)),
            metrics: Arc::new(Metrics::default()),
            random: Random::default(),
        }
    }

    pub(super) fn tables(&self) -> Arc<Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn replace_tables(&self, tables: Tables) {
        *self.tables.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(tables);
    }

    /// Handles what a client sent; an answer replaces what is in `buffer`.
    pub(super) fn handle(&self, bytes: &[u8], client: IpAddr, transport: Transport, buffer: &mut Vec<u8>) -> Handled {
        let started = Instant::now();
        let guarded =
            catch_unwind(AssertUnwindSafe(|| self.handle_unguarded(bytes, client, transport, started, buffer)));
        guarded.unwrap_or_else(|_| {
            increment(&self.metrics.panics);
            tracing::error!("a query made the DNS server panic; it is not answered");
            Handled::Ignored
        })
    }

    fn handle_unguarded(
        &self,
        bytes: &[u8],
        client: IpAddr,
        transport: Transport,
        started: Instant,
        buffer: &mut Vec<u8>,
    ) -> Handled {
        let family = Family::of(client.to_canonical());
        let query = match wire::decode_request(bytes) {
            Request::Ignored => return Handled::Ignored,
            Request::Refused(code, answer) => {
                self.metrics.request(transport, family, bytes.len(), None);
                *buffer = answer;
                self.metrics.response(code, buffer.len(), started.elapsed());
                return Handled::Answered;
            }
            Request::Query(query) => query,
        };
        self.metrics.request(transport, family, bytes.len(), Some(query.question.record_type));
        let limit = match transport {
            Transport::Udp => query.udp_limit(),
            Transport::Tcp => MESSAGE_LENGTH_MAX,
        };
        let outcome = self.with_context(started, |context| chain::answer(&query.question, context));
        let response = match outcome {
            Outcome::Answer(response) => response,
            Outcome::Refuse => Response::empty(ResponseCode::REFUSED),
            Outcome::Forward { question, aliases } => {
                if let Ok(place) = self.forwards.clone().try_acquire_owned() {
                    let pending = Pending { query, question, aliases, limit, started, _place: place };
                    return Handled::Pending(Box::new(pending));
                }
                increment(&self.metrics.forward_rejects);
                Response::empty(ResponseCode::REFUSED)
            }
        };
        self.finish(&query, &response, limit, started, buffer);
        Handled::Answered
    }

    /// Asks the upstreams; the answer replaces what is in `buffer`.
    pub(super) async fn resolve(&self, pending: Pending, buffer: &mut Vec<u8>) {
        let Pending { query, question, aliases, limit, started, _place } = pending;
        let asked = self.upstreams.exchange(&question, &self.random, &self.metrics).await;
        let response = match asked {
            Ok(response) => response,
            Err(error) => {
                tracing::debug!(%error, name = %question.name, "no upstream answered");
                Response::empty(ResponseCode::SERVER_FAILURE)
            }
        };
        let response = self.with_context(Instant::now(), |context| chain::learn(&question, aliases, response, context));
        self.finish(&query, &response, limit, started, buffer);
    }

    fn with_context<T>(&self, now: Instant, act: impl FnOnce(&Context<'_>) -> T) -> T {
        let tables = self.tables();
        act(&Context {
            settings: &self.settings,
            names: &tables.names,
            snapshot: &tables.snapshot,
            cache: &self.cache,
            metrics: &self.metrics,
            now,
            seed: self.random.next(),
        })
    }

    fn finish(&self, query: &Query, response: &Response, limit: usize, started: Instant, buffer: &mut Vec<u8>) {
        wire::encode_response(query, response, limit, buffer);
        self.metrics.response(response.code, buffer.len(), started.elapsed());
    }
}
