//! Probes on this node: watching for them, by a capture in a thread of its own, and sending them.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::BoxStream;
use portolan_kernel::KernelError;
use portolan_kernel::capture::{Capture, Direction};
use portolan_kernel::netns::{Namespace, in_namespace};
use portolan_net::{Frame, NodeName, Protocol, parse_ethernet, parse_ip};
use portolan_trace::Sighting;

use crate::api::{ObserveQuestion, Observed, ProbeAnswer, ProbeQuestion};
use crate::limits::{OBSERVATION_MAX, SIGHTINGS_MAX};
use crate::probe;

/// TCP flags SYN and ACK (RFC 9293 §3.1).
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Types of an echo request (RFC 792, RFC 4443 §4.1).
const ICMP_ECHO: [u8; 2] = [8, 128];

/// Opens the capture in the calling thread's namespace, and reports what looks like the probe.
pub(super) fn watch(node: NodeName, question: ObserveQuestion) -> Result<BoxStream<'static, String>, KernelError> {
    let mut capture = Capture::open()?;
    let (sender, receiver) = futures_channel();
    let deadline = Instant::now() + Duration::from_millis(question.milliseconds).min(OBSERVATION_MAX);
    std::thread::spawn(move || {
        let mut sightings = 0;
        while let Ok(Some(captured)) = capture.next_until(deadline) {
            let Ok(frame) = parse_ethernet(&captured.bytes).or_else(|_| parse_ip(&captured.bytes)) else { continue };
            if !is_probe(&frame, &question) {
                continue;
            }
            let microseconds = u64::try_from(captured.time.as_micros()).unwrap_or(u64::MAX);
            let sighting = Sighting {
                node: node.clone(),
                interface: captured.interface,
                outgoing: captured.direction == Direction::Out,
                packet: frame.packet,
                microseconds,
            };
            let observed = Observed { sighting, tcp_sequence: frame.tcp_sequence };
            let Ok(line) = serde_json::to_string(&observed) else { continue };
            sightings += 1;
            if sender.blocking_send(line).is_err() || sightings == SIGHTINGS_MAX {
                return;
            }
        }
    });
    Ok(receiver)
}

fn futures_channel() -> (tokio::sync::mpsc::Sender<String>, BoxStream<'static, String>) {
    let (sender, receiver) = tokio::sync::mpsc::channel(SIGHTINGS_MAX);
    let stream =
        futures::stream::unfold(
            receiver,
            |mut receiver| async move { receiver.recv().await.map(|line| (line, receiver)) },
        );
    (sender, stream.boxed())
}

fn is_probe(frame: &Frame, question: &ObserveQuestion) -> bool {
    let packet = &frame.packet;
    if packet.protocol != question.protocol {
        return false;
    }
    let has_port = question.destination_ports.is_empty()
        || question.destination_ports.contains(&packet.destination_port)
        || question.source_port == packet.source_port;
    match packet.protocol {
        Protocol::Tcp => has_port && frame.tcp_flags & (SYN | ACK) == SYN,
        Protocol::Udp | Protocol::Sctp => frame.payload == question.cookie.as_bytes(),
        // The answer has the same payload.
        Protocol::Icmp => {
            frame.icmp_type.is_some_and(|kind| ICMP_ECHO.contains(&kind)) && frame.payload == question.cookie.as_bytes()
        }
    }
}

/// Sends a probe from a pod's namespace, or from the agent's own.
pub(super) fn send_probe(namespace: Option<&str>, question: &ProbeQuestion) -> Result<ProbeAnswer, String> {
    let send = || probe::send_blocking(&question.packet, &question.cookie).map_err(|error| error.to_string());
    let Some(path) = namespace else { return send() };
    let namespace = Namespace::open(Path::new(path)).map_err(|error| error.to_string())?;
    in_namespace(&namespace, send).map_err(|error| error.to_string())?
}
