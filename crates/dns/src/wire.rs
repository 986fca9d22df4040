//! Messages on the wire: RFC 1035 §4, EDNS0 (RFC 6891).
//!
//! It promises to read or refuse any bytes without a panic, to answer in the spelling that the
//! client used, and that no answer is longer than the client takes: what does not fit is left out,
//! first what was only helpful (no mark, RFC 2181 §9), then answers (marked TC). The codec is
//! `hickory-proto`'s, whose types do not leave this file.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query as HickoryQuery, ResponseCode as HickoryCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, HINFO, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record as HickoryRecord, RecordType as HickoryType};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};
use portolan_intent::names::{self, DomainName, RecordData};

use crate::limits::{MESSAGE_LENGTH_MAX, UDP_PAYLOAD_MAX, UDP_PAYLOAD_PLAIN};

/// The length of a message's header.
const HEADER_LENGTH: usize = 12;

/// What follows the serial number in the zone's SOA record: refresh, retry and expire, as CoreDNS.
const SOA_TIMERS: (i32, i32, i32) = (7200, 1800, 86_400);

/// A record type by its number (IANA "Resource Record (RR) TYPEs").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordType(pub u16);

impl RecordType {
    /// IPv4 address.
    pub const A: RecordType = RecordType(1);
    /// Name server.
    pub const NS: RecordType = RecordType(2);
    /// Alias.
    pub const CNAME: RecordType = RecordType(5);
    /// Start of authority.
    pub const SOA: RecordType = RecordType(6);
    /// Name of an address.
    pub const PTR: RecordType = RecordType(12);
    /// Host information; what RFC 8482 answers ANY with.
    pub const HINFO: RecordType = RecordType(13);
    /// Text.
    pub const TXT: RecordType = RecordType(16);
    /// IPv6 address.
    pub const AAAA: RecordType = RecordType(28);
    /// Service location.
    pub const SRV: RecordType = RecordType(33);
    /// Every type.
    pub const ANY: RecordType = RecordType(255);

    /// Whether the number asks for something else than records of one type, and not for ANY:
    /// RFC 6895 §3.1 (QTYPEs and meta-TYPEs), OPT included.
    fn is_meta(self) -> bool {
        self.0 == 41 || (128..=254).contains(&self.0)
    }
}

/// A response code by its number (RFC 6895 §2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResponseCode(pub u16);

impl ResponseCode {
    /// No error.
    pub const NO_ERROR: ResponseCode = ResponseCode(0);
    /// The query cannot be read.
    pub const FORMAT_ERROR: ResponseCode = ResponseCode(1);
    /// The server failed.
    pub const SERVER_FAILURE: ResponseCode = ResponseCode(2);
    /// No such name: NXDOMAIN.
    pub const NO_SUCH_NAME: ResponseCode = ResponseCode(3);
    /// Not implemented.
    pub const NOT_IMPLEMENTED: ResponseCode = ResponseCode(4);
    /// Refused.
    pub const REFUSED: ResponseCode = ResponseCode(5);
    /// An EDNS version that is not spoken here (RFC 6891 §6.1.3).
    pub const BAD_VERSION: ResponseCode = ResponseCode(16);

    /// The name, as `dig` prints it.
    pub fn name(self) -> &'static str {
        match self.0 {
            0 => "NOERROR",
            1 => "FORMERR",
            2 => "SERVFAIL",
            3 => "NXDOMAIN",
            4 => "NOTIMP",
            5 => "REFUSED",
            16 => "BADVERS",
            _ => "other",
        }
    }
}

/// What is asked, apart from who asks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Question {
    /// The name.
    pub name: DomainName,
    /// The type; the class is always IN.
    pub record_type: RecordType,
    /// EDNS bit DO: signatures are wanted (RFC 3225).
    pub dnssec_ok: bool,
    /// Bit CD: the client checks signatures itself (RFC 4035 §3.2.2).
    pub checking_disabled: bool,
}

/// A query that can be answered.
#[derive(Debug, Clone)]
pub struct Query {
    /// The client's number for it.
    pub id: u16,
    /// What is asked.
    pub question: Question,
    /// Bit RD.
    recursion_desired: bool,
    /// The payload that the client takes, if it speaks EDNS.
    edns_payload: Option<u16>,
    /// The question as the client spelled it.
    spelled: HickoryQuery,
}

impl Query {
    /// The longest answer that the client takes over UDP. Values under 512 mean 512 (RFC 6891
    /// §6.2.5).
    pub fn udp_limit(&self) -> usize {
        match self.edns_payload {
            Some(payload) => usize::from(payload).clamp(UDP_PAYLOAD_PLAIN, UDP_PAYLOAD_MAX),
            None => UDP_PAYLOAD_PLAIN,
        }
    }
}

/// What bytes from a client are.
#[derive(Debug, Clone)]
pub enum Request {
    /// A query.
    Query(Box<Query>),
    /// Something that is answered with this code and these bytes.
    Refused(ResponseCode, Vec<u8>),
    /// Something that is not answered: too short to have a header, or itself an answer, which to
    /// answer could go on for ever.
    Ignored,
}

/// A record of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record(HickoryRecord);

/// An answer, apart from who asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The code.
    pub code: ResponseCode,
    /// Bit AA: it comes from the tables, not from an upstream.
    pub authoritative: bool,
    /// Bit AD, as an upstream set it (RFC 4035 §3.2.3).
    pub authentic: bool,
    /// Section "answer".
    pub answers: Vec<Record>,
    /// Section "authority".
    pub authority: Vec<Record>,
    /// Section "additional", without OPT.
    pub additional: Vec<Record>,
}

impl Response {
    /// An answer without records.
    pub fn empty(code: ResponseCode) -> Response {
        Response {
            code,
            authoritative: false,
            authentic: false,
            answers: Vec::new(),
            authority: Vec::new(),
            additional: Vec::new(),
        }
    }

    /// All records.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.answers.iter().chain(&self.authority).chain(&self.additional)
    }

    /// All records, to change them.
    pub fn records_mut(&mut self) -> impl Iterator<Item = &mut Record> {
        self.answers.iter_mut().chain(&mut self.authority).chain(&mut self.additional)
    }
}

impl Record {
    /// A record of the cluster. `None` if a name in it cannot be on the wire.
    pub fn new(record: &names::Record, ttl: u32) -> Option<Record> {
        let data = match &record.data {
            RecordData::Address(std::net::IpAddr::V4(address)) => RData::A(A(*address)),
            RecordData::Address(std::net::IpAddr::V6(address)) => RData::AAAA(AAAA(*address)),
            RecordData::Alias(target) => RData::CNAME(CNAME(wire_name(target)?)),
            RecordData::Pointer(target) => RData::PTR(PTR(wire_name(target)?)),
            RecordData::NameServer(target) => RData::NS(NS(wire_name(target)?)),
            RecordData::Text(text) => RData::TXT(TXT::from_bytes(vec![text.as_bytes()])),
            RecordData::Service { priority, weight, port, target } => {
                RData::SRV(SRV::new(*priority, *weight, *port, wire_name(target)?))
            }
            RecordData::Authority { primary, mailbox, serial } => {
                let (refresh, retry, expire) = SOA_TIMERS;
                // The last number is the time to live of denials (RFC 2308 §4).
                let (primary, mailbox) = (wire_name(primary)?, wire_name(mailbox)?);
                RData::SOA(SOA::new(primary, mailbox, *serial, refresh, retry, expire, ttl))
            }
        };
        Some(Record(HickoryRecord::from_rdata(wire_name(&record.name)?, ttl, data)))
    }

    /// The answer to ANY for a name that exists (RFC 8482 §4.2).
    pub fn any_is_obsolete(name: &DomainName, ttl: u32) -> Option<Record> {
        let data = HINFO::new("RFC8482".to_owned(), String::new());
        Some(Record(HickoryRecord::from_rdata(wire_name(name)?, ttl, RData::HINFO(data))))
    }

    /// The type.
    pub fn record_type(&self) -> RecordType {
        RecordType(u16::from(self.0.record_type()))
    }

    /// Seconds for which it may be kept.
    pub fn ttl(&self) -> u32 {
        self.0.ttl
    }

    /// Sets the seconds for which it may be kept.
    pub fn set_ttl(&mut self, ttl: u32) {
        self.0.ttl = ttl;
    }

    /// For a SOA record, how long a denial may be kept: the smaller of its own time to live and of
    /// its field MINIMUM (RFC 2308 §5).
    pub fn denial_ttl(&self) -> Option<u32> {
        match &self.0.data {
            RData::SOA(soa) => Some(self.0.ttl.min(soa.minimum)),
            _ => None,
        }
    }

    /// Name, type and value as text, without the time to live.
    pub fn text(&self) -> String {
        format!("{} {} {}", self.0.name.to_lowercase(), self.0.record_type(), self.0.data)
    }
}

fn wire_name(name: &DomainName) -> Option<Name> {
    let mut wire = Name::from_labels(name.labels()).ok()?;
    wire.set_fqdn(true);
    Some(wire)
}

/// Reads what a client sent.
pub fn decode_request(bytes: &[u8]) -> Request {
    let Some(header) = bytes.first_chunk::<HEADER_LENGTH>() else { return Request::Ignored };
    if header[2] & 0x80 != 0 {
        return Request::Ignored;
    }
    if header[2] & 0x78 != 0 {
        return refused(header, ResponseCode::NOT_IMPLEMENTED);
    }
    // Exactly one question: several have no meaning that servers agree on (RFC 9619 §4).
    if header[4..6] != [0, 1] {
        return refused(header, ResponseCode::FORMAT_ERROR);
    }
    let Ok(mut message) = Message::from_vec(bytes) else { return refused(header, ResponseCode::FORMAT_ERROR) };
    let Some(spelled) = message.queries.pop() else { return refused(header, ResponseCode::FORMAT_ERROR) };
    let Ok(name) = DomainName::from_labels(spelled.name.iter()) else {
        return refused(header, ResponseCode::FORMAT_ERROR);
    };
    let class = spelled.query_class;
    let query = Query {
        id: message.metadata.id,
        question: Question {
            name,
            record_type: RecordType(u16::from(spelled.query_type)),
            dnssec_ok: message.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
            checking_disabled: message.metadata.checking_disabled,
        },
        recursion_desired: message.metadata.recursion_desired,
        edns_payload: message.edns.as_ref().map(Edns::max_payload),
        spelled,
    };
    let code = if message.edns.is_some_and(|edns| edns.version() > 0) {
        ResponseCode::BAD_VERSION
    } else if class != DNSClass::IN || query.question.record_type.is_meta() {
        ResponseCode::REFUSED
    } else {
        return Request::Query(Box::new(query));
    };
    let mut answer = Vec::new();
    encode_response(&query, &Response::empty(code), UDP_PAYLOAD_PLAIN, &mut answer);
    Request::Refused(code, answer)
}

/// A header alone, for bytes whose question cannot be trusted.
fn refused(header: &[u8; HEADER_LENGTH], code: ResponseCode) -> Request {
    // QR, and opcode and RD as they were.
    let flags = [0x80 | header[2] & 0x79, code.0 as u8];
    let mut answer = vec![header[0], header[1], flags[0], flags[1]];
    answer.resize(HEADER_LENGTH, 0);
    Request::Refused(code, answer)
}

/// Writes the answer to a query, in at most `limit` bytes; what was in `buffer` is replaced.
pub fn encode_response(query: &Query, response: &Response, limit: usize, buffer: &mut Vec<u8>) {
    let mut message = Message::new(query.id, MessageType::Response, OpCode::Query);
    message.metadata.authoritative = response.authoritative;
    message.metadata.recursion_desired = query.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.authentic_data = response.authentic;
    message.metadata.checking_disabled = query.question.checking_disabled;
    message.metadata.response_code = code_on_wire(response.code, query.edns_payload.is_some());
    message.queries.push(query.spelled.clone());
    let spelled = |records: &[Record]| -> Vec<HickoryRecord> {
        let mut records: Vec<HickoryRecord> = records.iter().map(|record| record.0.clone()).collect();
        for record in records.iter_mut().filter(|record| record.name == query.spelled.name) {
            record.name.clone_from(&query.spelled.name);
        }
        records
    };
    message.answers = spelled(&response.answers);
    message.authorities = spelled(&response.authority);
    message.additionals = spelled(&response.additional);
    if query.edns_payload.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD_MAX as u16).set_version(0).set_dnssec_ok(query.question.dnssec_ok);
        message.edns = Some(edns);
    }
    if fits(&message, limit, buffer) {
        return;
    }
    message.additionals.clear();
    if fits(&message, limit, buffer) {
        return;
    }
    message.metadata.truncation = true;
    message.authorities.clear();
    while !fits(&message, limit, buffer) {
        if message.answers.is_empty() {
            // A question and an OPT record fit in 512 bytes; what cannot be written is a failure.
            let head = [query.id.to_be_bytes()[0], query.id.to_be_bytes()[1], 0x80, 2];
            buffer.clear();
            buffer.extend_from_slice(&head);
            buffer.resize(HEADER_LENGTH, 0);
            return;
        }
        message.answers.truncate(message.answers.len() / 2);
    }
}

fn fits(message: &Message, limit: usize, buffer: &mut Vec<u8>) -> bool {
    buffer.clear();
    let mut encoder = BinEncoder::new(buffer);
    encoder.set_max_size(MESSAGE_LENGTH_MAX as u16);
    // The codec cuts at its own limit and marks that in the header: then it did not fit either.
    message.emit(&mut encoder).is_ok()
        && buffer.len() <= limit
        && (message.metadata.truncation || buffer.get(2).is_some_and(|flags| flags & 0x02 == 0))
}

/// Codes above 15 need EDNS (RFC 6891 §6.1.3); a client without it is told of a failure.
fn code_on_wire(code: ResponseCode, has_edns: bool) -> HickoryCode {
    let code = if code.0 > 15 && !has_edns { ResponseCode::SERVER_FAILURE } else { code };
    HickoryCode::from((code.0 >> 4) as u8, (code.0 & 0x0f) as u8)
}

/// Writes a query to an upstream. `None` if the name cannot be on the wire.
pub fn encode_query(id: u16, question: &Question) -> Option<Vec<u8>> {
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_PAYLOAD_MAX as u16).set_version(0).set_dnssec_ok(question.dnssec_ok);
    encode_query_with(id, question, Some(edns))
}

/// The same without EDNS, for upstreams that do not know it (RFC 6891 §6.2.2).
pub fn encode_plain_query(id: u16, question: &Question) -> Option<Vec<u8>> {
    encode_query_with(id, question, None)
}

fn encode_query_with(id: u16, question: &Question, edns: Option<Edns>) -> Option<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.checking_disabled = question.checking_disabled;
    message.queries.push(HickoryQuery::query(wire_name(&question.name)?, HickoryType::from(question.record_type.0)));
    message.edns = edns;
    message.to_vec().ok()
}

/// An upstream's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamAnswer {
    /// The answer.
    pub response: Response,
    /// Bit TC: there is more, over TCP.
    pub truncated: bool,
}

/// Reads an upstream's answer. `None` if it is not the answer to this query: another number,
/// another question, no answer at all, or unreadable. Whoever guesses a source port must guess
/// these too (RFC 5452 §3).
pub fn decode_answer(bytes: &[u8], id: u16, question: &Question) -> Option<UpstreamAnswer> {
    let Ok(message) = Message::from_vec(bytes) else { return cut_answer(bytes, id) };
    let is_answer = message.metadata.id == id
        && message.metadata.message_type == MessageType::Response
        && message.metadata.op_code == OpCode::Query;
    let code = ResponseCode(u16::from(message.metadata.response_code));
    let same_question = match message.queries.as_slice() {
        [asked] => {
            DomainName::from_labels(asked.name.iter()).is_ok_and(|name| name == question.name)
                && u16::from(asked.query_type) == question.record_type.0
                && asked.query_class == DNSClass::IN
        }
        // Who cannot read a query cannot repeat its question.
        [] => is_plea_for_plain(code),
        _ => false,
    };
    if !is_answer || !same_question {
        return None;
    }
    let records = |records: Vec<HickoryRecord>| records.into_iter().map(Record).collect();
    Some(UpstreamAnswer {
        response: Response {
            code,
            authoritative: false,
            authentic: message.metadata.authentic_data,
            answers: records(message.answers),
            authority: records(message.authorities),
            additional: records(message.additionals),
        },
        truncated: message.metadata.truncation,
    })
}

/// Whether an upstream says with this code that it does not know EDNS (RFC 6891 §7).
pub fn is_plea_for_plain(code: ResponseCode) -> bool {
    matches!(code, ResponseCode::FORMAT_ERROR | ResponseCode::NOT_IMPLEMENTED)
}

/// Some servers cut a message in the middle of a record: of that, only the mark TC is read.
fn cut_answer(bytes: &[u8], id: u16) -> Option<UpstreamAnswer> {
    let header = bytes.first_chunk::<HEADER_LENGTH>()?;
    let is_cut_answer = header[..2] == id.to_be_bytes() && header[2] & 0xfa == 0x82;
    is_cut_answer.then(|| UpstreamAnswer { response: Response::empty(ResponseCode::SERVER_FAILURE), truncated: true })
}

#[cfg(test)]
mod tests;
