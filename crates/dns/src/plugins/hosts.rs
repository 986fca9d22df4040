//! `hosts`: names with fixed addresses, from the configuration.
//!
//! **Promise.** A name that is configured has exactly the configured addresses, whatever the
//! cluster says, in both directions. Names that are not configured are passed on. Records of other
//! types do not exist for a configured name, and are not looked for elsewhere.

use portolan_intent::names::{Record as NameRecord, RecordData};
use portolan_net::Origin;

use crate::chain::{Context, Plugin, Step};
use crate::limits::HOSTS_TTL;
use crate::plugins::kubernetes::{denial, matches};
use crate::wire::{Question, Record, RecordType, Response, ResponseCode};

/// The plugin.
pub const PLUGIN: Plugin = Plugin { name: "hosts", answer };

fn answer(question: &Question, context: &Context<'_>) -> Step {
    let settings = context.settings;
    let data: Vec<RecordData> = if let Some(addresses) = settings.hosts.get(&question.name) {
        addresses.iter().copied().map(RecordData::Address).collect()
    } else if let Some(names) = settings.hosts_reverse.get(&question.name) {
        names.iter().cloned().map(RecordData::Pointer).collect()
    } else {
        return Step::Next;
    };
    if question.record_type == RecordType::ANY {
        let record = Record::any_is_obsolete(&question.name, HOSTS_TTL);
        return Step::Answer(Response {
            authoritative: true,
            answers: record.into_iter().collect(),
            ..Response::empty(ResponseCode::NO_ERROR)
        });
    }
    let record = |data: RecordData| {
        let record = NameRecord { name: question.name.clone(), data, origin: Origin::configuration("hosts") };
        Record::new(&record, HOSTS_TTL)
    };
    let answers: Vec<Record> =
        data.into_iter().filter(|data| matches(data, question.record_type)).filter_map(record).collect();
    if answers.is_empty() {
        return Step::Answer(denial(ResponseCode::NO_ERROR, question, context));
    }
    Step::Answer(Response { authoritative: true, answers, ..Response::empty(ResponseCode::NO_ERROR) })
}
