//! Sysctls of the calling thread's network namespace, by path below `/proc/sys`.

use std::path::Path;

use crate::error::KernelError;

/// The value, without the line's end.
pub fn read(path: &str) -> Result<String, KernelError> {
    let text = std::fs::read_to_string(Path::new("/proc/sys").join(path))
        .map_err(|error| KernelError::file(format!("read sysctl {path}"), &error))?;
    Ok(text.trim_end().to_owned())
}

/// Sets the value.
pub fn write(path: &str, value: &str) -> Result<(), KernelError> {
    std::fs::write(Path::new("/proc/sys").join(path), value).map_err(|error| {
        let hint = if path.starts_with("net/bridge/") { " (load the br_netfilter module)" } else { "" };
        KernelError::file(format!("set sysctl {path} to {value}{hint}"), &error)
    })
}
