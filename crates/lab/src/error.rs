//! Errors of the lab, by what their reader can do about them.

/// What went wrong. The kind decides the exit code of the command.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The command or a file is wrong: the reader changes what they wrote.
    #[error("{what}")]
    Usage {
        /// What is wrong, and where.
        what: String,
        /// What to write instead.
        hint: String,
    },
    /// The machine lacks something, or something is in the way.
    #[error("{what}")]
    Environment {
        /// What is missing.
        what: String,
        /// How to get it.
        hint: String,
    },
    /// The question was answered, and the answer is no.
    #[error("{what}")]
    Negative {
        /// What is not so.
        what: String,
        /// Where to look next.
        hint: String,
    },
    /// Something that should not happen.
    #[error("{0:#}")]
    Internal(#[from] anyhow::Error),
}

/// A result of the lab.
pub type Result<T, E = LabError> = std::result::Result<T, E>;

impl LabError {
    /// A mistake in the command or in a file.
    pub fn usage(what: impl Into<String>, hint: impl Into<String>) -> LabError {
        LabError::Usage { what: what.into(), hint: hint.into() }
    }

    /// Something that the machine lacks.
    pub fn environment(what: impl Into<String>, hint: impl Into<String>) -> LabError {
        LabError::Environment { what: what.into(), hint: hint.into() }
    }

    /// A negative answer.
    pub fn negative(what: impl Into<String>, hint: impl Into<String>) -> LabError {
        LabError::Negative { what: what.into(), hint: hint.into() }
    }

    /// What to do about it; empty if nothing is known.
    pub fn hint(&self) -> &str {
        match self {
            LabError::Usage { hint, .. } | LabError::Environment { hint, .. } | LabError::Negative { hint, .. } => hint,
            LabError::Internal(_) => "",
        }
    }

    /// The exit code: 1 no, 2 usage, 3 environment, 4 internal.
    pub fn exit_code(&self) -> u8 {
        match self {
            LabError::Negative { .. } => 1,
            LabError::Usage { .. } => 2,
            LabError::Environment { .. } => 3,
            LabError::Internal(_) => 4,
        }
    }
}
