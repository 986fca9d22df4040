//! The Internet checksum (RFC 1071), fast enough to be taken of every byte that passes.
//!
//! The sum is taken in the byte order of the machine: it is the same in any order, but for the order of its own bytes
//! (RFC 1071 §2(B)), and it is read and written as bytes here.

/// A sum of 16-bit words that is not folded yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum(u64);

/// Bytes that are summed at a time: eight lanes, which compilers turn into vectors.
const STEP: usize = 32;

impl Sum {
    /// Adds bytes. An odd number of them may only be the last.
    pub(super) fn add(self, bytes: &[u8]) -> Sum {
        let mut lanes = [0u64; STEP / 4];
        let (steps, rest) = bytes.as_chunks::<STEP>();
        for step in steps {
            let (words, _) = step.as_chunks::<4>();
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let mut sum: u64 = lanes.iter().sum::<u64>() + self.0;
        let (pairs, last) = rest.as_chunks::<2>();
        for pair in pairs {
            sum += u64::from(u16::from_ne_bytes(*pair));
        }
        if let [last] = last {
            sum += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        Sum(sum)
    }

    /// The sum in 16 bits, as it lies in a header whose checksum is to be completed by someone else.
    pub(super) fn partial(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: the complement of the sum.
    pub(super) fn finish(self) -> [u8; 2] {
        self.partial().map(|byte| !byte)
    }
}

/// The sum of the header that TCP and UDP imagine before their own (RFC 9293 §3.1, RFC 8200 §8.1). `addresses` are
/// the source's and the destination's bytes as they lie in the IP header.
pub(super) fn pseudo_header(addresses: &[u8], protocol: u8, length: usize) -> Sum {
    Sum::default().add(addresses).add(&(length as u32).to_be_bytes()).add(&[0, protocol])
}

/// Changes a checksum for a 16-bit word that changes in what it covers (RFC 1624, equation 3).
pub(super) fn replace(checksum: [u8; 2], old: [u8; 2], new: [u8; 2]) -> [u8; 2] {
    let not = |bytes: [u8; 2]| bytes.map(|byte| !byte);
    Sum::default().add(&not(checksum)).add(&not(old)).add(&new).finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 to the letter.
    pub(crate) fn naive(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    }

    proptest! {
        #[test]
        fn it_is_the_naive_one(bytes: Vec<u8>, cut in 0usize..200) {
            prop_assert_eq!(Sum::default().add(&bytes).finish(), naive(&bytes));
            let cut = (cut * 2).min(bytes.len() & !1);
            let (head, tail) = bytes.split_at(cut);
            prop_assert_eq!(Sum::default().add(head).add(tail).finish(), naive(&bytes));
        }

        #[test]
        fn a_replaced_word_is_as_good_as_a_new_sum(mut bytes in proptest::collection::vec(1u8.., 20), new: [u8; 2]) {
            let before = naive(&bytes);
            let old = [bytes[8], bytes[9]];
            bytes[8..10].copy_from_slice(&new);
            prop_assert_eq!(replace(before, old, new), naive(&bytes));
        }
    }

    #[test]
    fn the_example_of_the_rfc() {
        // RFC 1071 §3: the sum is ddf2.
        let sum = Sum::default().add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), [0xdd, 0xf2]);
    }
}
