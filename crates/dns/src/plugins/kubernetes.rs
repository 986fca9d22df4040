//! `kubernetes`: the cluster's names, straight from its tables.
//!
//! **Promise.** Every name in the zone is answered here and nowhere else, with authority; so is
//! every address of ours in the reverse domains. A name that does not exist is NXDOMAIN, one
//! without records of the type is NOERROR without answers, both with the zone's SOA record, so that
//! resolvers may keep the denial (RFC 2308 §2). Until the tables are in sync the answer is SERVFAIL:
//! a wrong NXDOMAIN would be kept. Addresses come in an order that the seed decides, so that
//! clients which take the first are spread (CoreDNS's `loadbalance`). ANY is answered with one HINFO
//! record (RFC 8482 §4.2). Addresses of other names in the reverse domains are passed on.

use std::net::IpAddr;

use portolan_intent::names::{Lookup, Record as NameRecord, RecordData};

use crate::chain::{Context, Plugin, Step};
use crate::wire::{Question, Record, RecordType, Response, ResponseCode};

/// The plugin.
pub const PLUGIN: Plugin = Plugin { name: "kubernetes", answer };

fn answer(question: &Question, context: &Context<'_>) -> Step {
    let (records, additional) = match context.names.lookup(context.snapshot, &question.name) {
        Lookup::NotOurs => return Step::Next,
        Lookup::NotReady => return Step::Answer(Response::empty(ResponseCode::SERVER_FAILURE)),
        Lookup::NoSuchName => return Step::Answer(denial(ResponseCode::NO_SUCH_NAME, question, context)),
        Lookup::Found { records, additional } => (records, additional),
    };
    let ttl = context.settings.ttl;
    if question.record_type == RecordType::ANY {
        let answers = Record::any_is_obsolete(&question.name, ttl).into_iter().collect();
        return Step::Answer(Response { authoritative: true, answers, ..Response::empty(ResponseCode::NO_ERROR) });
    }
    if question.record_type != RecordType::CNAME
        && let Some(alias) = records.iter().find_map(|record| alias(record, ttl))
    {
        return alias;
    }
    let mut answers: Vec<Record> = records
        .iter()
        .filter(|record| matches(&record.data, question.record_type))
        .filter_map(|record| Record::new(record, ttl))
        .collect();
    if answers.is_empty() {
        return Step::Answer(denial(ResponseCode::NO_ERROR, question, context));
    }
    shuffle(&mut answers, context.seed);
    Step::Answer(Response {
        authoritative: true,
        answers,
        additional: additional.iter().filter_map(|record| Record::new(record, ttl)).collect(),
        ..Response::empty(ResponseCode::NO_ERROR)
    })
}

fn alias(record: &NameRecord, ttl: u32) -> Option<Step> {
    match &record.data {
        RecordData::Alias(target) => Some(Step::Alias(Box::new(Record::new(record, ttl)?), target.clone())),
        _ => None,
    }
}

/// Whether a record answers a question for a type.
pub(super) fn matches(data: &RecordData, record_type: RecordType) -> bool {
    record_type
        == match data {
            RecordData::Address(IpAddr::V4(_)) => RecordType::A,
            RecordData::Address(IpAddr::V6(_)) => RecordType::AAAA,
            RecordData::Alias(_) => RecordType::CNAME,
            RecordData::Service { .. } => RecordType::SRV,
            RecordData::Pointer(_) => RecordType::PTR,
            RecordData::Text(_) => RecordType::TXT,
            RecordData::NameServer(_) => RecordType::NS,
            RecordData::Authority { .. } => RecordType::SOA,
        }
}

/// A denial with the SOA record that says how long it may be kept (RFC 2308 §3).
pub(super) fn denial(code: ResponseCode, question: &Question, context: &Context<'_>) -> Response {
    let authority = context.names.authority(context.snapshot, &question.name);
    Response {
        authoritative: true,
        authority: Record::new(&authority, context.settings.ttl).into_iter().collect(),
        ..Response::empty(code)
    }
}

/// Fisher and Yates' shuffle, on a linear congruential generator (Knuth's MMIX): it spreads load and
/// guards no secret.
fn shuffle(records: &mut [Record], seed: u64) {
    let mut state = seed;
    for end in (1..records.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        records.swap(end, ((state >> 33) % (end as u64 + 1)) as usize);
    }
}
