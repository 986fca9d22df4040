//! Keys, revisions, transactions, compaction.

use super::{Context, Outcome, promise};
use crate::error::StoreError;
use crate::types::{Compare, KeyRange, Operation, OperationResult, RangeRequest, Relation, Target, Transaction};

pub(super) async fn a_key_that_is_written_is_read(context: &Context<'_>) -> Outcome {
    promise!(context.get("a").await?.is_none(), "a key is there that was never written");
    let first = context.put("a", "1").await?;
    let second = context.put("a", "2").await?;
    let item = context.get("a").await?.ok_or("the key is missing")?;
    promise!(item.value == b"2", "the value is {:?}", item.value);
    promise!(item.create_revision == first, "created by {} and not {first}", item.create_revision);
    promise!(item.mod_revision == second, "written by {} and not {second}", item.mod_revision);
    promise!(item.version == 2, "version {} after two writes", item.version);
    context.delete("a").await?;
    promise!(context.get("a").await?.is_none(), "the key is there after its removal");
    let again = context.put("a", "3").await?;
    let item = context.get("a").await?.ok_or("the key is missing")?;
    promise!(item.version == 1 && item.create_revision == again, "a key that returns begins anew");
    Ok(())
}

pub(super) async fn revisions_rise_by_one_with_each_change(context: &Context<'_>) -> Outcome {
    let first = context.put("a", "1").await?;
    let second = context.put("b", "1").await?;
    promise!(second == first + 1, "{first} is followed by {second}");
    let nothing = context.delete("missing").await?;
    promise!(nothing == second, "a removal of nothing made revision {nothing}");
    let third = context.put("b", "1").await?;
    promise!(third == second + 1, "a write of the same value is a change");
    promise!(context.store.revision().await? == third, "the store's revision is not the last write's");
    Ok(())
}

pub(super) async fn a_range_is_ordered_limited_and_counted(context: &Context<'_>) -> Outcome {
    for name in ["c", "a", "d", "b"] {
        context.put(name, "x").await?;
    }
    let texts = context.content(0).await?;
    promise!(texts == ["a=x", "b=x", "c=x", "d=x"], "the range is {texts:?}");
    let request = RangeRequest { limit: 3, ..RangeRequest::new(context.all()) };
    let read = context.store.range(request).await?;
    promise!(read.items.len() == 3 && read.more && read.count == 4, "limit 3 of 4: {} items", read.items.len());
    let request = RangeRequest { count_only: true, ..RangeRequest::new(context.all()) };
    let read = context.store.range(request).await?;
    promise!(read.items.is_empty() && read.count == 4, "only a count was asked for");
    let request = RangeRequest { keys_only: true, ..RangeRequest::new(context.all()) };
    let read = context.store.range(request).await?;
    promise!(read.items.len() == 4 && read.items.iter().all(|item| item.value.is_empty()), "only keys were asked for");
    let span = KeyRange::span(context.key("b"), context.key("d"));
    let read = context.store.range(RangeRequest::new(span)).await?;
    promise!(read.count == 2, "from b to before d are {} keys", read.count);
    let empty = KeyRange::span(context.key("d"), context.key("b"));
    let read = context.store.range(RangeRequest::new(empty)).await?;
    promise!(read.count == 0, "from d to before b are {} keys", read.count);
    Ok(())
}

pub(super) async fn a_range_of_the_past_shows_the_past(context: &Context<'_>) -> Outcome {
    let first = context.put("a", "1").await?;
    let second = context.put("b", "1").await?;
    let third = context.put("a", "2").await?;
    let fourth = context.delete("b").await?;
    for (revision, expected) in
        [(first, vec!["a=1"]), (second, vec!["a=1", "b=1"]), (third, vec!["a=2", "b=1"]), (fourth, vec!["a=2"])]
    {
        let texts = context.content(revision).await?;
        promise!(texts == expected, "at {revision} the range is {texts:?} and not {expected:?}");
    }
    Ok(())
}

pub(super) async fn a_failed_compare_runs_the_other_branch(context: &Context<'_>) -> Outcome {
    let create = Transaction::put(context.key("a"), "1")
        .when(Compare::absent(context.key("a")))
        .otherwise(Operation::Range(RangeRequest::new(KeyRange::key(context.key("a")))));
    let first = context.store.transaction(create.clone()).await?;
    promise!(first.succeeded, "the key was not absent");
    let second = context.store.transaction(create).await?;
    promise!(!second.succeeded, "the key was created twice");
    promise!(second.revision == first.revision, "a transaction that only read made a revision");
    let Some(OperationResult::Range(read)) = second.results.first() else {
        return Err("the failure branch did not answer".into());
    };
    promise!(read.items.len() == 1 && read.items[0].value == b"1", "the failure branch did not read the key");
    Ok(())
}

pub(super) async fn every_kind_of_compare_works(context: &Context<'_>) -> Outcome {
    let created = context.put("a", "m").await?;
    let written = context.put("a", "m").await?;
    use Relation::{Equal, Greater, Less, NotEqual};
    let cases = [
        ("a", Equal, Target::ModRevision(written), true),
        ("a", Less, Target::ModRevision(written), false),
        ("a", Equal, Target::CreateRevision(created), true),
        ("a", Greater, Target::CreateRevision(created), false),
        ("a", Equal, Target::Version(2), true),
        ("a", NotEqual, Target::Version(2), false),
        ("a", Equal, Target::Lease(0), true),
        ("a", Equal, Target::Value(b"m".to_vec()), true),
        ("a", Greater, Target::Value(b"l".to_vec()), true),
        ("a", Less, Target::Value(b"l".to_vec()), false),
        ("missing", Equal, Target::Version(0), true),
        ("missing", Equal, Target::ModRevision(0), true),
        ("missing", NotEqual, Target::Value(b"m".to_vec()), false),
    ];
    for (key, relation, target, expected) in cases {
        let compare = Compare { key: context.key(key), relation, target };
        let text = format!("{compare:?}");
        let result = context.store.transaction(Transaction::default().when(compare)).await?;
        promise!(result.succeeded == expected, "{text} gives {}", result.succeeded);
    }
    Ok(())
}

pub(super) async fn a_transaction_has_one_revision(context: &Context<'_>) -> Outcome {
    context.put("old", "1").await?;
    let transaction = Transaction::put(context.key("a"), "1")
        .then(Operation::Put { key: context.key("b"), value: b"1".to_vec(), lease: 0 })
        .then(Operation::Delete(KeyRange::key(context.key("old"))));
    let result = context.store.transaction(transaction).await?;
    for name in ["a", "b"] {
        let item = context.get(name).await?.ok_or("a key is missing")?;
        promise!(item.mod_revision == result.revision, "{name} was written by {}", item.mod_revision);
    }
    let before = context.content(result.revision - 1).await?;
    promise!(before == ["old=1"], "before the transaction there is {before:?}");
    Ok(())
}

pub(super) async fn a_transaction_sees_its_own_steps(context: &Context<'_>) -> Outcome {
    context.put("a", "1").await?;
    let transaction = Transaction::put(context.key("b"), "1")
        .then(Operation::Delete(KeyRange::key(context.key("a"))))
        .then(Operation::Range(RangeRequest::new(context.all())));
    let result = context.store.transaction(transaction).await?;
    let Some(OperationResult::Range(read)) = result.results.last() else {
        return Err("the read was not answered".into());
    };
    promise!(read.items.len() == 1 && read.items[0].key == context.key("b"), "the read does not see the steps before");
    let Some(OperationResult::Delete { deleted }) = result.results.get(1) else {
        return Err("the removal was not answered".into());
    };
    promise!(deleted.len() == 1 && deleted[0].value == b"1", "the removal does not say what it removed");
    Ok(())
}

pub(super) async fn a_key_changes_once_in_a_transaction(context: &Context<'_>) -> Outcome {
    let put = |value: &str| Operation::Put { key: context.key("a"), value: value.into(), lease: 0 };
    let twice = Transaction { success: vec![put("1"), put("2")], ..Transaction::default() };
    let result = context.store.transaction(twice).await;
    promise!(matches!(result, Err(StoreError::DuplicateKey { .. })), "a key was written twice: {result:?}");
    let remove = || Operation::Delete(context.all());
    for success in [vec![put("1"), remove()], vec![remove(), put("1")]] {
        let result = context.store.transaction(Transaction { success, ..Transaction::default() }).await;
        promise!(
            matches!(result, Err(StoreError::DuplicateKey { .. })),
            "a key was written and removed in one transaction: {result:?}"
        );
    }
    let twice = Transaction { success: vec![remove(), remove()], ..Transaction::default() };
    context.store.transaction(twice).await?;
    promise!(context.get("a").await?.is_none(), "a refused transaction had an effect");
    Ok(())
}

pub(super) async fn an_empty_key_is_refused(context: &Context<'_>) -> Outcome {
    let when = Transaction::default().when(Compare::absent(""));
    for transaction in [Transaction::put("", "1"), when] {
        let result = context.store.transaction(transaction).await;
        promise!(matches!(result, Err(StoreError::EmptyKey)), "an empty key gives {result:?}");
    }
    Ok(())
}

pub(super) async fn of_two_writers_one_wins(context: &Context<'_>) -> Outcome {
    let read = context.put("a", "0").await?;
    let write = |value: &str| {
        let key = context.key("a");
        context.store.transaction(Transaction::put(key.clone(), value).when(Compare::unchanged(key, read)))
    };
    let (left, right) = tokio::join!(write("left"), write("right"));
    let (left, right) = (left?.succeeded, right?.succeeded);
    promise!(left != right, "two writers that read the same version: {left} and {right}");
    Ok(())
}

pub(super) async fn compaction_hides_the_past_and_keeps_the_present(context: &Context<'_>) -> Outcome {
    context.put("kept", "1").await?;
    context.put("gone", "1").await?;
    let old = context.put("changed", "1").await?;
    context.put("changed", "2").await?;
    let kept = context.delete("gone").await?;
    context.put("changed", "3").await?;
    context.store.compact(kept).await?;
    let past = context.content(old).await;
    promise!(matches!(past, Err(StoreError::Compacted { .. })), "the compacted past gives {past:?}");
    let oldest = context.content(kept).await?;
    promise!(oldest == ["changed=2", "kept=1"], "at the compacted revision there is {oldest:?}");
    let present = context.content(0).await?;
    promise!(present == ["changed=3", "kept=1"], "the present is {present:?}");
    let again = context.store.compact(kept).await;
    promise!(matches!(again, Err(StoreError::Compacted { .. })), "a second compaction gives {again:?}");
    Ok(())
}

pub(super) async fn the_future_cannot_be_read(context: &Context<'_>) -> Outcome {
    let revision = context.put("a", "1").await?;
    let read = context.content(revision + 1_000_000).await;
    promise!(matches!(read, Err(StoreError::FutureRevision { .. })), "a revision to come gives {read:?}");
    Ok(())
}
