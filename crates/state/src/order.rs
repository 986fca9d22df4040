//! An order in which large maps are filled.

/// The items of a sorted list: every second one first, then those between.
///
/// A persistent map (`imbl::OrdMap`) keeps its entries in leaves of 16, and halves a leaf that overflows. Filled in
/// order, all its leaves stay half empty; filled in this order, they are full: the second half fits exactly.
pub fn by_halves<T>(sorted: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for (position, item) in sorted.into_iter().enumerate() {
        if position % 2 == 0 { first.push(item) } else { second.push(item) }
    }
    first.into_iter().chain(second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_second_one_comes_first() {
        assert_eq!(by_halves(0..7).collect::<Vec<_>>(), [0, 2, 4, 6, 1, 3, 5]);
        assert_eq!(by_halves(0..0).count(), 0);
    }
}
