//! Leases: keys that end with their holder.

use std::time::Duration;

use super::{Context, Outcome, promise};
use crate::error::StoreError;
use crate::types::{LeaseId, Operation, Transaction, WatchRequest};

const TIME_TO_LIVE: Duration = Duration::from_secs(3);
const LESS: Duration = Duration::from_secs(2);
const MORE: Duration = Duration::from_secs(5);

async fn put_leased(context: &Context<'_>, name: &str, lease: LeaseId) -> Result<(), StoreError> {
    let put = Operation::Put { key: context.key(name), value: b"leased".to_vec(), lease };
    let transaction = Transaction { success: vec![put], ..Transaction::default() };
    context.store.transaction(transaction).await.map(drop)
}

pub(super) async fn a_lease_takes_its_keys_along(context: &Context<'_>) -> Outcome {
    let lease = context.store.lease_grant(0, TIME_TO_LIVE).await?;
    promise!(lease.granted == TIME_TO_LIVE, "granted {:?}", lease.granted);
    put_leased(context, "a", lease.id).await?;
    put_leased(context, "b", lease.id).await?;
    context.put("own", "1").await?;
    let status = context.store.lease_time_to_live(lease.id).await?;
    promise!(status.keys == [context.key("a"), context.key("b")], "the lease holds {} keys", status.keys.len());
    promise!(status.remaining <= TIME_TO_LIVE, "more is left than was granted: {:?}", status.remaining);
    let mut watcher = context.store.watch(WatchRequest::new(context.all(), 0)).await?;
    context.harness.advance(MORE).await;
    let (_, events) = context.events(&mut watcher).await?;
    promise!(events == ["Delete a=", "Delete b="], "the end of the lease was seen as {events:?}");
    let content = context.content(0).await?;
    promise!(content == ["own=1"], "after the lease there is {content:?}");
    let gone = context.store.lease_time_to_live(lease.id).await;
    promise!(matches!(gone, Err(StoreError::LeaseNotFound(_))), "the lease that ended gives {gone:?}");
    Ok(())
}

pub(super) async fn a_lease_that_is_kept_alive_lives(context: &Context<'_>) -> Outcome {
    let lease = context.store.lease_grant(0, TIME_TO_LIVE).await?;
    put_leased(context, "a", lease.id).await?;
    for _ in 0..3 {
        context.harness.advance(LESS).await;
        context.store.lease_keep_alive(lease.id).await?;
    }
    promise!(context.get("a").await?.is_some(), "the key went although its lease was kept alive");
    Ok(())
}

pub(super) async fn a_revoked_lease_takes_its_keys_along(context: &Context<'_>) -> Outcome {
    let lease = context.store.lease_grant(0, TIME_TO_LIVE).await?;
    put_leased(context, "a", lease.id).await?;
    put_leased(context, "b", lease.id).await?;
    let before = context.store.revision().await?;
    context.store.lease_revoke(lease.id).await?;
    promise!(context.content(0).await?.is_empty(), "keys outlived their lease");
    let after = context.store.revision().await?;
    promise!(after == before + 1, "two keys ended in {} revisions", after - before);
    Ok(())
}

pub(super) async fn a_rewritten_key_leaves_its_lease(context: &Context<'_>) -> Outcome {
    let lease = context.store.lease_grant(0, TIME_TO_LIVE).await?;
    put_leased(context, "a", lease.id).await?;
    context.put("a", "own").await?;
    context.store.lease_revoke(lease.id).await?;
    let content = context.content(0).await?;
    promise!(content == ["a=own"], "after the lease there is {content:?}");
    Ok(())
}

pub(super) async fn a_missing_lease_is_refused(context: &Context<'_>) -> Outcome {
    let lease = context.store.lease_grant(0, TIME_TO_LIVE).await?;
    let taken = context.store.lease_grant(lease.id, TIME_TO_LIVE).await;
    promise!(matches!(taken, Err(StoreError::LeaseExists(_))), "an id that is taken gives {taken:?}");
    context.store.lease_revoke(lease.id).await?;
    let put = put_leased(context, "a", lease.id).await;
    promise!(matches!(put, Err(StoreError::LeaseNotFound(_))), "a write with a lease that ended gives {put:?}");
    let kept = context.store.lease_keep_alive(lease.id).await;
    promise!(matches!(kept, Err(StoreError::LeaseNotFound(_))), "keeping alive what ended gives {kept:?}");
    let revoked = context.store.lease_revoke(lease.id).await;
    promise!(matches!(revoked, Err(StoreError::LeaseNotFound(_))), "a second revocation gives {revoked:?}");
    promise!(context.get("a").await?.is_none(), "a refused write had an effect");
    Ok(())
}
