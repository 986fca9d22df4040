//! `portolan lab exec`: runs a command in a pod, on a node or on a client.

use std::ffi::OsString;

use crate::description::Description;
use crate::inside;
use crate::target::Target;
use crate::{LabError, Layout, Result};

/// Becomes the command, so its exit code is this process's.
///
/// # Errors
/// Only returns if the target or the command does not exist.
pub fn exec(name: &str, target: &Target, container: Option<&str>, command: &[OsString]) -> Result<()> {
    let layout = Layout::new(name)?;
    let description = Description::load(&layout)?;
    let entry = target.entry(&layout, &description)?;
    if let Some(container) = container {
        let record = target.record(&layout)?;
        let known: Vec<&str> = record.containers.iter().map(|it| it.name.as_str()).collect();
        if !known.contains(&container) {
            return Err(LabError::negative(
                format!("{target} has no container `{container}`"),
                format!("it has {}", known.join(", ")),
            ));
        }
    }
    inside::become_command(&entry, None, command).map_err(|error| {
        LabError::environment(
            format!("{error:#}"),
            "the command must be installed on this machine: pods share its files",
        )
    })
}
