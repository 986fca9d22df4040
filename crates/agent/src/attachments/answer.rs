//! What is answered to the runtime, from records and from the state of the agent.

use portolan_cni::{AddResult, CniError, Interface, IpConfiguration, Request, Response, Route};
use portolan_intent::wiring::gateway;
use portolan_state::Attachment;

use super::{AttachmentBook, key_of};

/// The answer to ADD, once the interface is made: the node's end, the pod's end, its addresses with
/// their gateways, and a default route of each family.
pub fn added(request: &Request, attachment: &Attachment, mtu: u32) -> Result<Response, CniError> {
    let made = result(attachment, mtu);
    let made = AddResult { dns: request.configuration.resolved_dns(), ..made };
    let previous = request.configuration.previous_result()?;
    Ok(Response::Added(match previous {
        Some(previous) => made.after(previous),
        None => made,
    }))
}

fn result(attachment: &Attachment, mtu: u32) -> AddResult {
    let host = Interface { name: attachment.host_interface.to_string(), mtu: Some(mtu), ..Interface::default() };
    let pod = Interface {
        name: attachment.key.interface.to_string(),
        mac: attachment.mac.to_string(),
        mtu: Some(mtu),
        sandbox: attachment.namespace_path.to_string(),
        ..Interface::default()
    };
    // The address carries the length of the node's prefix, so its first address is the bridge's.
    let gateways = attachment.addresses.iter().map(|address| gateway(address).map(|gateway| gateway.addr()));
    let ips = attachment.addresses.iter().zip(gateways.clone());
    AddResult {
        interfaces: vec![host, pod],
        ips: ips.map(|(address, gateway)| IpConfiguration { address: *address, gateway, interface: Some(1) }).collect(),
        routes: gateways.flatten().map(Route::default_via).collect(),
        ..AddResult::default()
    }
}

/// The first half of CHECK: whether the record exists and `prevResult` says what it says. The
/// caller then looks whether the kernel holds it.
pub fn check<'a>(book: &'a AttachmentBook, request: &Request) -> Result<&'a Attachment, CniError> {
    let key = key_of(&request.parameters);
    let Some(attachment) = book.get(&key) else {
        return Err(CniError::unknown_container(format!("{key} is not known on this node"))
            .with_details("it was never added, or it was deleted"));
    };
    let had = request.configuration.previous_result()?.ok_or_else(|| {
        CniError::invalid_configuration("CHECK needs `prevResult`, the result of the ADD that it is about")
    })?;
    let mut differences = had.differences(&result(attachment, 0));
    if *attachment.namespace_path != *request.parameters.namespace_path {
        differences.push(format!("it was added to the namespace {}", attachment.namespace_path));
    }
    if differences.is_empty() {
        return Ok(attachment);
    }
    Err(CniError::attachment_differs(format!("{key} is not as it was added: {}", differences.join("; ")))
        .with_details("delete the container and add it again"))
}

/// STATUS: whether an ADD would be served. `in_sync` is whether the agent has read the cluster's
/// tables, before which it changes nothing in the kernel.
pub fn status(book: &AttachmentBook, in_sync: bool) -> Result<Response, CniError> {
    if !in_sync {
        return Err(CniError::not_available("the agent has not read the cluster's tables yet")
            .with_details("see that the agent reaches the API server: `portolan doctor`"));
    }
    match book.check_free() {
        Ok(()) => Ok(Response::Done),
        Err(error) => Err(CniError::not_available(error.to_string())
            .with_details("remove pods from this node, call GC, or give the node a pod CIDR with room")),
    }
}
