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
    let attachment = book.add(request, mtu)?;
    let key = attachment.key.clone();
    engine.write(Change::Upsert(Object::Attachment(attachment.clone()), Vec::new()));
    let mut outcome = engine.cycle();
    match outcome.failed_pods.remove(&key) {
        None => answer::added(request, &attachment, mtu),
        Some(error) => {
            // Nothing half-made stays: neither in the kernel, nor in the book.
            forget(engine, book, &key)?;
            Err(kernel_error(&error, &key))
        }
    }
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
    // Before in-sync the kernel is left alone, so the address must stay taken until then.
    if let Some(waiting) = engine.waiting() {
        return Err(CniError::try_again_later(waiting.to_string()));
    }
    engine.write(Change::Delete(ObjectRef::Attachment(key.clone())));
    engine.cycle();
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
    CniError::io(format!("the interface of {key} cannot be made or read: {error}"))
}
