//! The bounds of everything that is read from outside.

/// The longest network configuration on standard input, in bytes. A GC call lists every attachment
/// of a node in about 100 bytes each, so this is room for ten thousand pods on one node.
pub const CONFIGURATION_BYTES_MAX: usize = 1 << 20;

/// The longest line between plugin and agent, in bytes: a configuration, its parameters, and what
/// JSON adds to them by escaping.
pub const LINE_BYTES_MAX: usize = 3 << 20;

/// The longest name of a Linux interface (`IFNAMSIZ` less the final zero).
pub const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// The longest container ID. The specification names no bound; runtimes use 64 hexadecimal digits.
pub const CONTAINER_ID_BYTES_MAX: usize = 1024;
