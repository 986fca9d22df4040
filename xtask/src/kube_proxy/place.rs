//! Where the real kube-proxy is kept.

use std::path::PathBuf;

/// Where the recipe keeps the binary.
pub(crate) fn default_directory() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    cache.unwrap_or_else(home).join("portolan/kube-proxy")
}
