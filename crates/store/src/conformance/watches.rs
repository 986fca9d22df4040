//! Watches: order, replay, what was before, compaction, slow readers.

use super::{Context, Outcome, next, promise};
use crate::error::StoreError;
use crate::limits::WATCH_BUFFER_MESSAGES;
use crate::types::{KeyRange, Operation, Transaction, WatchRequest};
use crate::watch::{WatchCancelled, WatchMessage};

pub(super) async fn a_watch_from_now_sees_what_follows(context: &Context<'_>) -> Outcome {
    context.put("a", "0").await?;
    let mut watcher = context.store.watch(WatchRequest::new(context.all(), 0)).await?;
    let first = context.put("a", "1").await?;
    context.store.transaction(Transaction::put("/conformance/elsewhere", "x")).await?;
    let second = context.delete("a").await?;
    promise!(context.events(&mut watcher).await? == (first, vec!["Put a=1".into()]), "the write was not seen first");
    promise!(context.events(&mut watcher).await? == (second, vec!["Delete a=".into()]), "the removal was not seen");
    promise!(watcher.resume_revision() == second + 1, "the watch would resume at {}", watcher.resume_revision());
    Ok(())
}

pub(super) async fn a_watch_replays_from_a_revision(context: &Context<'_>) -> Outcome {
    context.put("a", "1").await?;
    let second = context.put("b", "2").await?;
    let third = context.delete("a").await?;
    let mut watcher = context.store.watch(WatchRequest::new(context.all(), second)).await?;
    let fourth = context.put("c", "4").await?;
    for expected in [(second, "Put b=2"), (third, "Delete a="), (fourth, "Put c=4")] {
        let (revision, events) = context.events(&mut watcher).await?;
        promise!((revision, events[0].as_str()) == expected, "{events:?} at {revision} and not {expected:?}");
    }
    Ok(())
}

pub(super) async fn a_watch_carries_what_was_before(context: &Context<'_>) -> Outcome {
    let first = context.put("a", "1").await?;
    context.put("a", "2").await?;
    context.delete("a").await?;
    for (previous, expected) in [(true, [None, Some("1"), Some("2")]), (false, [None; 3])] {
        let request = WatchRequest { previous, ..WatchRequest::new(context.all(), first) };
        let mut watcher = context.store.watch(request).await?;
        for expected in expected {
            let Ok(WatchMessage::Events { events, .. }) = next(&mut watcher).await? else {
                return Err("the watch ended".into());
            };
            let before = events[0].previous.as_ref().map(|item| String::from_utf8_lossy(&item.value).into_owned());
            promise!(before.as_deref() == expected, "before was {before:?} and not {expected:?}");
        }
    }
    Ok(())
}

pub(super) async fn a_watch_gets_a_revision_as_one_message(context: &Context<'_>) -> Outcome {
    let mut watcher = context.store.watch(WatchRequest::new(context.all(), 0)).await?;
    let put = |name: &str| Operation::Put { key: context.key(name), value: b"x".to_vec(), lease: 0 };
    let transaction = Transaction { success: vec![put("b"), put("a")], ..Transaction::default() };
    context.store.transaction(transaction).await?;
    let (_, events) = context.events(&mut watcher).await?;
    promise!(events.len() == 2, "two keys of one revision came as {events:?}");
    Ok(())
}

pub(super) async fn a_watch_before_compaction_is_refused(context: &Context<'_>) -> Outcome {
    let first = context.put("a", "1").await?;
    let second = context.put("a", "2").await?;
    let third = context.put("a", "3").await?;
    context.store.compact(second).await?;
    // What the compacted revision itself changed is gone, too: it can be read, and watched from the next.
    for start in [first, second] {
        match context.store.watch(WatchRequest::new(context.all(), start)).await {
            Err(StoreError::Compacted { compacted, .. }) => {
                promise!(compacted == second, "the oldest revision is said to be {compacted} and not {second}");
            }
            other => return Err(format!("a watch of the compacted past gives {other:?}").into()),
        }
    }
    let mut watcher = context.store.watch(WatchRequest::new(context.all(), third)).await?;
    let (revision, _) = context.events(&mut watcher).await?;
    promise!(revision == third, "the watch began at {revision}");
    Ok(())
}

/// A reader that never reads is cut off; what it was sent before still arrives, and a new watch from
/// where it ended brings all of the rest.
pub(super) async fn a_slow_watch_is_cut_off_and_resumes(context: &Context<'_>) -> Outcome {
    let range = KeyRange::key(context.key("a"));
    let mut watcher = context.store.watch(WatchRequest::new(range.clone(), 0)).await?;
    let first = context.put("a", "0").await?;
    let writes = WATCH_BUFFER_MESSAGES + 100;
    let mut last = first;
    for number in 1..writes {
        last = context.put("a", &number.to_string()).await?;
    }
    let mut seen = Vec::new();
    let resume = loop {
        match next(&mut watcher).await? {
            Ok(WatchMessage::Events { revision, .. }) => seen.push(revision),
            Ok(WatchMessage::Progress { .. }) => {}
            Err(WatchCancelled::TooSlow { resume } | WatchCancelled::Closed { resume }) => break resume,
            Err(other) => return Err(other.into()),
        }
    };
    let mut watcher = context.store.watch(WatchRequest::new(range, resume)).await?;
    while seen.last() != Some(&last) {
        seen.push(context.events(&mut watcher).await?.0);
    }
    promise!(seen.len() == writes, "{} of {writes} writes were seen", seen.len());
    promise!(seen.is_sorted_by(|left, right| left < right), "writes were seen twice or out of order");
    Ok(())
}
