//! How results and failures are printed, and which exit code they have.

use std::process::ExitCode;

use clap::ValueEnum;
use portolan_agent::table::Table;

/// The form of the data on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people
    Text,
    /// JSON for programs
    Json,
    /// YAML
    Yaml,
}

/// Why a command failed, by what the reader can do.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The answer is no. Exit code 1.
    No(anyhow::Error),
    /// The command line is wrong. Exit code 2.
    Usage(anyhow::Error),
    /// Something that the command needs is not there. Exit code 3.
    Environment(anyhow::Error),
    /// A fault of ours. Exit code 4.
    Internal(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Environment(error)
    }
}

impl Failure {
    /// Prints the failure and its causes to stderr; returns its exit code.
    pub(crate) fn report(&self) -> ExitCode {
        let (error, code) = match self {
            Failure::No(error) => (error, 1),
            Failure::Usage(error) => (error, 2),
            Failure::Environment(error) => (error, 3),
            Failure::Internal(error) => (error, 4),
        };
        eprintln!("error: {error}");
        for cause in error.chain().skip(1) {
            eprintln!("caused by: {cause}");
        }
        ExitCode::from(code)
    }
}

/// Prints a table in the wanted form.
pub(crate) fn print_table(table: &Table, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => print_value(&table.items, format),
        Format::Yaml => print_value(&table.items, format),
        Format::Text => {
            print!("{}", columns(&table.columns, &table.rows));
            Ok(())
        }
    }
}

/// Prints a value as JSON or YAML; as text, JSON is the best there is.
pub(crate) fn print_value<T: serde::Serialize>(value: &T, format: Format) -> Result<(), Failure> {
    let text = match format {
        Format::Json | Format::Text => serde_json::to_string_pretty(value).map_err(anyhow::Error::from),
        Format::Yaml => serde_saphyr::to_string(value).map_err(anyhow::Error::from),
    };
    println!("{}", text.map_err(Failure::Internal)?.trim_end());
    Ok(())
}

/// Rows under headings, aligned as kubectl aligns them.
pub(crate) fn columns(headings: &[String], rows: &[Vec<String>]) -> String {
    let width = |index: usize| {
        let cells = rows.iter().filter_map(|row| row.get(index)).chain(headings.get(index));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    for row in std::iter::once(headings).chain(rows.iter().map(Vec::as_slice)) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.push_str(&" ".repeat(width + 3 - cell.chars().count()));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let text = columns(&["A".into(), "B".into()], &[vec!["long".into(), "x".into()], vec!["s".into(), "y".into()]]);
        assert_eq!(text, "A      B\nlong   x\ns      y\n");
    }
}
