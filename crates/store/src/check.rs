//! What every driver refuses before it does anything, so that they refuse the same.

use std::collections::BTreeSet;

use crate::error::StoreError;
use crate::limits::{KEY_BYTES_MAX, TRANSACTION_OPERATIONS_MAX, VALUE_BYTES_MAX};
use crate::types::{Operation, Transaction};

/// Whether a transaction keeps the bounds and changes no key twice. A write of a key that lies in a
/// removed range counts as twice, whether the key was there or not.
pub(crate) fn transaction(transaction: &Transaction) -> Result<(), StoreError> {
    let bound = |what, limit, actual| {
        if actual > limit { Err(StoreError::TooLarge { what, limit, actual }) } else { Ok(()) }
    };
    bound("the number of conditions of a transaction", TRANSACTION_OPERATIONS_MAX, transaction.compares.len())?;
    for compare in &transaction.compares {
        not_empty(&compare.key)?;
    }
    for branch in [&transaction.success, &transaction.failure] {
        bound("the number of operations in a transaction", TRANSACTION_OPERATIONS_MAX, branch.len())?;
        let mut keys = BTreeSet::new();
        for operation in branch {
            if let Operation::Put { key, value, .. } = operation {
                not_empty(key)?;
                bound("the length of a key", KEY_BYTES_MAX, key.len())?;
                bound("the length of a value", VALUE_BYTES_MAX, value.len())?;
                if !keys.insert(key) {
                    return Err(twice(key));
                }
            }
        }
        for operation in branch {
            if let Operation::Delete(range) = operation
                && let Some(key) = keys.iter().find(|key| range.contains(key))
            {
                return Err(twice(key));
            }
        }
    }
    Ok(())
}

fn twice(key: &[u8]) -> StoreError {
    StoreError::DuplicateKey { key: String::from_utf8_lossy(key).into_owned() }
}

fn not_empty(key: &[u8]) -> Result<(), StoreError> {
    if key.is_empty() { Err(StoreError::EmptyKey) } else { Ok(()) }
}
