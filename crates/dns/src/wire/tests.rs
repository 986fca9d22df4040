//! Any bytes are read or refused; what is written can be read, and is as long as allowed.

use std::net::IpAddr;

use portolan_intent::names::Record as NameRecord;
use portolan_net::Origin;
use proptest::prelude::*;

use super::*;

fn query_bytes(name: &str, record_type: RecordType, edns: bool) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.queries.push(HickoryQuery::query(Name::from_ascii(name).unwrap(), HickoryType::from(record_type.0)));
    message.metadata.recursion_desired = true;
    if edns {
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        message.edns = Some(edns);
    }
    message.to_vec().unwrap()
}

fn query(bytes: &[u8]) -> Query {
    match decode_request(bytes) {
        Request::Query(query) => *query,
        other => panic!("{other:?} is no query"),
    }
}

fn code(bytes: &[u8]) -> Option<ResponseCode> {
    match decode_request(bytes) {
        Request::Refused(code, answer) => {
            let answer = Message::from_vec(&answer).expect("an answer that can be read");
            assert_eq!(answer.metadata.message_type, MessageType::Response);
            Some(code)
        }
        Request::Query(_) | Request::Ignored => None,
    }
}

fn addresses(count: u16) -> Response {
    let record = |index: u16| {
        let address = IpAddr::from([10, 42, (index >> 8) as u8, index as u8]);
        let record = NameRecord {
            name: "web.default.svc.cluster.local".parse().unwrap(),
            data: RecordData::Address(address),
            origin: Origin::configuration("a test"),
        };
        Record::new(&record, 5).unwrap()
    };
    Response { answers: (0..count).map(record).collect(), ..Response::empty(ResponseCode::NO_ERROR) }
}

#[test]
fn what_is_no_single_query_is_refused_with_the_right_code() {
    let good = query_bytes("web.default.svc.cluster.local.", RecordType::A, true);
    assert!(code(&good).is_none());
    let with = |index: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[index] = value;
        bytes
    };
    assert_eq!(code(&with(5, 2)), Some(ResponseCode::FORMAT_ERROR), "two questions");
    assert_eq!(code(&with(5, 0)), Some(ResponseCode::FORMAT_ERROR), "no question");
    assert_eq!(code(&with(2, 0x28)), Some(ResponseCode::NOT_IMPLEMENTED), "an update");
    assert_eq!(code(&good[..20]), Some(ResponseCode::FORMAT_ERROR), "cut in the question");
    // The question's class is CHAOS.
    let class = good.len() - 11 - 1;
    assert_eq!(code(&with(class, 3)), Some(ResponseCode::REFUSED));
    // EDNS version 1: the third byte of the OPT record's time to live is before its flags and length.
    assert_eq!(code(&with(good.len() - 5, 1)), Some(ResponseCode::BAD_VERSION));
    let transfer = query_bytes("cluster.local.", RecordType(252), false);
    assert_eq!(code(&transfer), Some(ResponseCode::REFUSED));
    assert!(matches!(decode_request(&with(2, 0x80)), Request::Ignored), "an answer is not answered");
    assert!(matches!(decode_request(&good[..11]), Request::Ignored));
}

#[test]
fn the_client_sees_its_own_spelling() {
    let query = query(&query_bytes("WeB.default.svc.Cluster.local.", RecordType::A, false));
    let mut bytes = Vec::new();
    encode_response(&query, &addresses(1), 512, &mut bytes);
    let message = Message::from_vec(&bytes).unwrap();
    assert!(message.queries[0].name.eq_case(&Name::from_ascii("WeB.default.svc.Cluster.local.").unwrap()));
    assert!(message.answers[0].name.eq_case(&message.queries[0].name));
    // Header 12, question 35, and one record whose name is a pointer of 2 bytes: 16.
    assert_eq!(bytes.len(), 12 + 35 + 16);
    assert!(message.edns.is_none(), "a client without EDNS gets none");
}

#[test]
fn too_many_answers_are_cut_and_marked() {
    let plain = query(&query_bytes("web.default.svc.cluster.local.", RecordType::A, false));
    let mut bytes = Vec::new();
    encode_response(&plain, &addresses(100), plain.udp_limit(), &mut bytes);
    let message = Message::from_vec(&bytes).unwrap();
    assert!(message.metadata.truncation && bytes.len() <= 512 && !message.answers.is_empty());
    let edns = query(&query_bytes("web.default.svc.cluster.local.", RecordType::A, true));
    encode_response(&edns, &addresses(60), edns.udp_limit(), &mut bytes);
    let message = Message::from_vec(&bytes).unwrap();
    assert!(!message.metadata.truncation && message.answers.len() == 60 && message.edns.is_some());
    encode_response(&plain, &addresses(100), MESSAGE_LENGTH_MAX, &mut bytes);
    assert_eq!(Message::from_vec(&bytes).unwrap().answers.len(), 100);
}

#[test]
fn helpful_records_go_first_and_without_a_mark() {
    let query = query(&query_bytes("web.default.svc.cluster.local.", RecordType::A, false));
    let response = Response { additional: addresses(100).answers, ..addresses(2) };
    let mut bytes = Vec::new();
    encode_response(&query, &response, 512, &mut bytes);
    let message = Message::from_vec(&bytes).unwrap();
    assert!(!message.metadata.truncation);
    assert_eq!((message.answers.len(), message.additionals.len()), (2, 0));
}

#[test]
fn only_the_answer_to_the_query_is_taken() {
    let question = Question {
        name: "example.org".parse().unwrap(),
        record_type: RecordType::A,
        dnssec_ok: false,
        checking_disabled: false,
    };
    let asked = encode_query(9, &question).unwrap();
    assert!(decode_answer(&asked, 9, &question).is_none(), "a query is no answer");
    let mut answer = asked;
    answer[2] |= 0x80;
    assert!(decode_answer(&answer, 9, &question).is_some());
    assert!(decode_answer(&answer, 8, &question).is_none());
    let mut cut = answer.clone();
    cut[2] |= 0x02;
    cut[7] = 9;
    assert!(decode_answer(&cut, 9, &question).is_some_and(|answer| answer.truncated), "nine answers, cut");
    let other = Question { name: "example.com".parse().unwrap(), ..question };
    assert!(decode_answer(&answer, 9, &other).is_none());
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
        let _ = code(&bytes);
    }

    #[test]
    fn any_query_with_a_wrong_byte_is_read_or_refused(index in 0usize..60, value: u8, edns: bool) {
        let mut bytes = query_bytes("web.default.svc.cluster.local.", RecordType::A, edns);
        let index = index % bytes.len();
        bytes[index] = value;
        if let Request::Query(query) = decode_request(&bytes) {
            for limit in [512, 1232, MESSAGE_LENGTH_MAX] {
                let mut answer = Vec::new();
                encode_response(&query, &addresses(40), limit, &mut answer);
                prop_assert!(answer.len() <= limit);
                prop_assert!(Message::from_vec(&answer).is_ok());
            }
        }
    }

    #[test]
    fn any_answer_of_an_upstream_is_read_or_passed_over(mut bytes: Vec<u8>, header: [u8; 12]) {
        let question = Question {
            name: "a".parse().unwrap(), record_type: RecordType::A, dnssec_ok: false, checking_disabled: false,
        };
        bytes.splice(0..0, header);
        let _ = decode_answer(&bytes, u16::from_be_bytes([header[0], header[1]]), &question);
    }
}
