//! Sysctls of the calling thread's network namespace, by path below `/proc/sys`.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::KernelError;

/// The value, without the line's end.
pub fn read(path: &str) -> Result<String, KernelError> {
    let text = std::fs::read_to_string(Path::new("/proc/sys").join(path))
        .map_err(|error| KernelError::file(format!("read sysctl {path}"), &error))?;
    Ok(text.trim_end().to_owned())
}

/// Sets the value. What a module of the kernel brings is there once the module is: it is loaded if it must be.
pub fn write(path: &str, value: &str) -> Result<(), KernelError> {
    let set = || std::fs::write(Path::new("/proc/sys").join(path), value);
    let result = match (set(), module_of(path)) {
        (Err(error), Some(module)) if error.kind() == io::ErrorKind::NotFound && load(module) => set(),
        (result, _) => result,
    };
    result.map_err(|error| {
        let hint = module_of(path).map(|module| format!(" (load the module {module})")).unwrap_or_default();
        KernelError::file(format!("set sysctl {path} to {value}{hint}"), &error)
    })
}

/// The module that brings a sysctl which the kernel may lack.
fn module_of(path: &str) -> Option<&'static str> {
    path.starts_with("net/bridge/").then_some("br_netfilter")
}

/// Whether the module is loaded now. The kernel loads no module by itself for the sake of its sysctls.
fn load(module: &str) -> bool {
    let mut modprobe = Command::new("modprobe");
    modprobe.args(["--quiet", "--", module]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    modprobe.status().is_ok_and(|status| status.success())
}
