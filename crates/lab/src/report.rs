//! What the supervisor tells the command that started it: one JSON object per line.

use std::io::{self, Write as _};

use serde::{Deserialize, Serialize};

use crate::LabError;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Report {
    /// What is being done.
    Progress(String),
    /// Everything was started.
    Ready,
    /// It ended.
    Failed {
        /// What happened.
        what: String,
        /// What to do.
        hint: String,
        /// The exit code.
        code: u8,
    },
}

impl Report {
    /// Writes the line.
    ///
    /// # Errors
    /// If nobody reads any more.
    pub(crate) fn send(&self) -> io::Result<()> {
        let mut output = io::stdout().lock();
        serde_json::to_writer(&mut output, self)?;
        output.write_all(b"\n")?;
        output.flush()
    }

    /// An error as a line.
    pub(crate) fn of(error: &LabError) -> Report {
        Report::Failed { what: error.to_string(), hint: error.hint().to_owned(), code: error.exit_code() }
    }

    /// The error that a line [`Report::Failed`] carries.
    pub(crate) fn error(what: String, hint: String, code: u8) -> LabError {
        match code {
            1 => LabError::Negative { what, hint },
            2 => LabError::Usage { what, hint },
            3 => LabError::Environment { what, hint },
            _ => LabError::Internal(anyhow::anyhow!(what)),
        }
    }
}
