//! CNI calls: each is an input like any other, and its answer goes out when the kernel holds the result.

use portolan_cni::{CniError, Command, Request, Response};
use portolan_kernel::KernelError;
use portolan_net::ObjectKind;
use portolan_state::{AttachmentKey, Change, Object, ObjectRef};

use super::engine::Engine;
use super::port::KernelPort;
use crate::attachments::{AttachmentBook, answer, key_of};

/// Answers one call. May run apply cycles.
pub(crate) fn answer_call<P: KernelPort>(
    engine: &mut Engine<P>,
    book: &mut AttachmentBook,
    request: &Request,
) -> Response {
    let command = request.parameters.command;
    let result = match command {
        Command::Add => add(engine, book, request),
        Command::Del => delete(engine, book, request),
        Command::Check => check(engine, book, request),
        Command::Gc => collect_garbage(engine, book, request),
        Command::Status => answer::status(book, engine.waiting().is_none()),
        Command::Version => Ok(Response::Done),
    };
    engine.metrics.cni(command.as_str(), result.is_ok());
    if let Err(error) = &result {
        tracing::info!(verb = command.as_str(), container = request.parameters.container, %error, "a CNI call failed");
    }
    result.into()
}

/// Tells the tables what the book holds: after a start, before the first cycle.
pub(crate) fn announce<P: KernelPort>(engine: &mut Engine<P>, book: &AttachmentBook) {
    let attachments = book.list().map(|attachment| (Object::Attachment(attachment.clone()), Vec::new())).collect();
    engine.write(Change::Replace(ObjectKind::Attachment, attachments, Vec::new()));
}

fn add<P: KernelPort>(
    engine: &mut Engine<P>,
    book: &mut AttachmentBook,
    request: &Request,
) -> Result<Response, CniError> {
    let Some(mtu) = engine.pod_mtu().filter(|_| engine.waiting().is_none()) else {
        let reason = engine.waiting().map(ToString::to_string).unwrap_or_default();
        return Err(CniError::try_again_later(reason));
    };
    book.set_prefixes(&engine.pod_prefixes());
    if book.get(&key_of(&request.parameters)).is_some() {
        // It was asked for before: whether it was also made is seen in the kernel alone.
        engine.distrust_pods();
    }
    let attachment = book.add(request, mtu)?;
    let key = attachment.key.clone();
    engine.write(Change::Upsert(Object::Attachment(attachment.clone()), Vec::new()));
    let mut outcome = engine.cycle();
    let error = match (outcome.ran, outcome.failed_pods.remove(&key)) {
        (true, None) => return answer::added(request, &attachment, mtu),
        (true, Some(error)) => kernel_error(&error, &key),
        (false, _) => CniError::try_again_later(engine.waiting().map(ToString::to_string).unwrap_or_default()),
    };
    // Nothing half-made stays: neither in the kernel, nor in the book.
    forget(engine, book, &key)?;
    Err(error)
}

fn delete<P: KernelPort>(
    engine: &mut Engine<P>,
    book: &mut AttachmentBook,
    request: &Request,
) -> Result<Response, CniError> {
    forget(engine, book, &key_of(&request.parameters))?;
    Ok(Response::Done)
}

/// Removes an attachment from the kernel and then from the book. One that is unknown is no error.
fn forget<P: KernelPort>(
    engine: &mut Engine<P>,
    book: &mut AttachmentBook,
    key: &AttachmentKey,
) -> Result<(), CniError> {
    if book.get(key).is_none() {
        return Ok(());
    }
    if !engine.snapshot().attachments.contains_key(key) {
        // An earlier call took it out of the tables and failed: what the kernel holds must be seen.
        engine.distrust_pods();
    }
    engine.write(Change::Delete(ObjectRef::Attachment(key.clone())));
    let mut outcome = engine.cycle();
    let removed = match (outcome.ran, outcome.failed_pods.remove(key)) {
        (true, None) => Ok(()),
        (true, Some(error)) => Err(error),
        // While the tables are not known in full the rest of the kernel is left alone. A pod that ends needs
        // nothing of them, and a node whose API server is away must be able to end its pods.
        (false, _) => engine.remove_pod(key),
    };
    // An interface that stays keeps its address and its record, so that no other pod gets the address.
    removed.map_err(|error| kernel_error(&error, key))?;
    book.remove(key)?;
    Ok(())
}

fn check<P: KernelPort>(
    engine: &mut Engine<P>,
    book: &AttachmentBook,
    request: &Request,
) -> Result<Response, CniError> {
    let attachment = answer::check(book, request)?;
    let pod = engine.netlink_program().and_then(|program| program.pods.get(&attachment.key)).cloned();
    let pod = pod.ok_or_else(|| CniError::try_again_later("the agent has not made this interface yet"))?;
    let differences = engine.port.check_pod(&pod);
    if differences.is_empty() {
        return Ok(Response::Done);
    }
    Err(CniError::attachment_differs(format!("{} is not as it was made: {}", attachment.key, differences.join("; ")))
        .with_details("delete the container and add it again"))
}

fn collect_garbage<P: KernelPort>(
    engine: &mut Engine<P>,
    book: &mut AttachmentBook,
    request: &Request,
) -> Result<Response, CniError> {
    let mut last_error = None;
    for key in book.collect_garbage(&request.configuration)? {
        tracing::info!(%key, "removing an attachment that the runtime does not know");
        if let Err(error) = forget(engine, book, &key) {
            last_error = Some(error);
        }
    }
    last_error.map_or(Ok(Response::Done), Err)
}

fn kernel_error(error: &KernelError, key: &AttachmentKey) -> CniError {
    match error {
        KernelError::NoNamespace { path, .. } => {
            CniError::invalid_environment(format!("CNI_NETNS={} for {key}: {error}", path.display()))
        }
        _ => CniError::wiring_failed(format!("the interface of {key} cannot be made or removed: {error}"))
            .with_details("see `portolan show problems` and the agent's log"),
    }
}
