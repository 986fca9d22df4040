//! Our nftables tables.
