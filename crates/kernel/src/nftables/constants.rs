//! Numbers of the kernel's interface (`linux/netfilter/nf_tables.h`, `nfnetlink.h`), under its names.

/// `NFNL_SUBSYS_NFTABLES`.
pub(super) const SUBSYSTEM: u16 = 10;
pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;

pub(super) const NEW_TABLE: u16 = 0;
pub(super) const GET_TABLE: u16 = 1;
pub(super) const DELETE_TABLE: u16 = 2;
pub(super) const NEW_CHAIN: u16 = 3;
pub(super) const GET_CHAIN: u16 = 4;
pub(super) const DELETE_CHAIN: u16 = 5;
pub(super) const NEW_RULE: u16 = 6;
pub(super) const GET_RULE: u16 = 7;
pub(super) const DELETE_RULE: u16 = 8;
pub(super) const NEW_SET: u16 = 9;
pub(super) const GET_SET: u16 = 10;
pub(super) const DELETE_SET: u16 = 11;
pub(super) const NEW_ELEMENT: u16 = 12;
pub(super) const GET_ELEMENT: u16 = 13;
pub(super) const DELETE_ELEMENT: u16 = 14;
pub(super) const NEW_GENERATION: u16 = 15;

/// `struct nfgenmsg`.
pub(super) const HEADER_LENGTH: usize = 4;
pub(super) const FAMILY_IPV4: u8 = 2;
pub(super) const FAMILY_IPV6: u8 = 10;

pub(super) mod table {
    pub(crate) const NAME: u16 = 1;
}

pub(super) mod chain {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const NAME: u16 = 3;
    pub(crate) const HOOK: u16 = 4;
    pub(crate) const POLICY: u16 = 5;
    pub(crate) const TYPE: u16 = 7;
    pub(crate) const HOOK_NUMBER: u16 = 1;
    pub(crate) const HOOK_PRIORITY: u16 = 2;
}

pub(super) mod rule {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const CHAIN: u16 = 2;
    pub(crate) const HANDLE: u16 = 3;
    pub(crate) const EXPRESSIONS: u16 = 4;
    pub(crate) const USER_DATA: u16 = 7;
    /// `NFTA_LIST_ELEM`.
    pub(crate) const LIST_ELEMENT: u16 = 1;
}

pub(super) mod set {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const NAME: u16 = 2;
    pub(crate) const FLAGS: u16 = 3;
    pub(crate) const KEY_TYPE: u16 = 4;
    pub(crate) const KEY_LENGTH: u16 = 5;
    pub(crate) const DATA_TYPE: u16 = 6;
    pub(crate) const DATA_LENGTH: u16 = 7;
    pub(crate) const DESCRIPTION: u16 = 9;
    pub(crate) const ID: u16 = 10;
    pub(crate) const USER_DATA: u16 = 13;
    /// `NFT_SET_INTERVAL`.
    pub(crate) const FLAG_INTERVAL: u32 = 4;
    /// `NFT_SET_MAP`.
    pub(crate) const FLAG_MAP: u32 = 8;
    /// `NFT_SET_TIMEOUT`.
    pub(crate) const FLAG_TIMEOUT: u32 = 16;
    /// `NFT_SET_EVAL`: packets change it.
    pub(crate) const FLAG_DYNAMIC: u32 = 32;
    /// `NFT_SET_CONCAT`: intervals of concatenated keys.
    pub(crate) const FLAG_CONCATENATED: u32 = 128;
    /// `NFTA_SET_DESC_SIZE`, `NFTA_SET_DESC_CONCAT`, `NFTA_SET_FIELD_LEN`.
    pub(crate) const DESCRIPTION_SIZE: u16 = 1;
    pub(crate) const DESCRIPTION_FIELDS: u16 = 2;
    pub(crate) const FIELD_LENGTH: u16 = 1;
}

pub(super) mod element {
    pub(crate) const LIST_TABLE: u16 = 1;
    pub(crate) const LIST_SET: u16 = 2;
    pub(crate) const LIST_ELEMENTS: u16 = 3;
    pub(crate) const KEY: u16 = 1;
    pub(crate) const DATA: u16 = 2;
    pub(crate) const FLAGS: u16 = 3;
    pub(crate) const USER_DATA: u16 = 6;
    pub(crate) const KEY_END: u16 = 10;
    /// `NFT_SET_ELEM_INTERVAL_END`.
    pub(crate) const FLAG_INTERVAL_END: u32 = 1;
}

pub(super) mod data {
    pub(crate) const VALUE: u16 = 1;
    pub(crate) const VERDICT: u16 = 2;
    pub(crate) const VERDICT_CODE: u16 = 1;
    pub(crate) const VERDICT_CHAIN: u16 = 2;
}

pub(super) mod verdict {
    /// `NF_DROP`.
    pub(crate) const DROP: i32 = 0;
    pub(crate) const JUMP: i32 = -3;
    pub(crate) const GOTO: i32 = -4;
    pub(crate) const RETURN: i32 = -5;
}

/// Types as `nft` numbers them, six bits each in a concatenation: what makes `nft list` readable.
pub(super) mod kind {
    pub(crate) const INTEGER: u32 = 4;
    pub(crate) const IPV4_ADDRESS: u32 = 7;
    pub(crate) const IPV6_ADDRESS: u32 = 8;
    pub(crate) const PROTOCOL: u32 = 12;
    pub(crate) const SERVICE: u32 = 13;
}
