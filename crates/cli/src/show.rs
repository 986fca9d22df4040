//! `portolan show`, `plan` and `doctor`.

use std::process::ExitCode;

use anyhow::Context;
use portolan_agent::client::ClientError;
use portolan_agent::table::{TABLES, Table};
use portolan_net::NodeName;

use crate::agents::ClusterArguments;
use crate::output::{Failure, Format, print_table};
use crate::roles::block_on;

#[derive(Debug, clap::Args)]
pub(crate) struct ShowArguments {
    /// The table: services, endpoints, nodes, pods, attachments, routes, names or problems
    table: String,
    /// Only rows in which a cell is this, or starts with it
    row: Option<String>,
    /// The node whose view is shown; any one by default
    #[arg(long)]
    node: Option<String>,
    /// The form of the output
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArguments,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PlanArguments {
    /// The node; all of them by default
    #[arg(long)]
    node: Option<String>,
    #[command(flatten)]
    cluster: ClusterArguments,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArguments {
    #[command(flatten)]
    cluster: ClusterArguments,
}

/// Prints a table.
pub(crate) fn run(arguments: &ShowArguments) -> Result<ExitCode, Failure> {
    if !TABLES.contains(&arguments.table.as_str()) {
        let known = TABLES.join(", ");
        return Err(Failure::Usage(anyhow::anyhow!("there is no table {}; there are: {known}", arguments.table)));
    }
    block_on(async {
        let agents = arguments.cluster.agents().await?;
        let (node, client) = agents.one(arguments.node.as_deref())?;
        let mut table: Table = client
            .get(&format!("/tables/{}", arguments.table))
            .await
            .with_context(|| format!("node {node} does not show its {}", arguments.table))?;
        if let Some(wanted) = &arguments.row {
            let keep: Vec<bool> =
                table.rows.iter().map(|row| row.iter().any(|cell| cell.starts_with(wanted.as_str()))).collect();
            let mut kept = keep.iter();
            table.rows.retain(|_| *kept.next().unwrap_or(&false));
            let mut kept = keep.iter();
            table.items.retain(|_| *kept.next().unwrap_or(&false));
        }
        print_table(&table, arguments.output)?;
        let is_found = arguments.row.is_none() || !table.rows.is_empty();
        Ok(if is_found { ExitCode::SUCCESS } else { ExitCode::from(1) })
    })
}

/// Prints what would change in the kernel. Exit code 1 if anything would.
pub(crate) fn plan(arguments: &PlanArguments) -> Result<ExitCode, Failure> {
    block_on(async {
        let agents = arguments.cluster.agents().await?;
        let mut is_clean = true;
        for (node, client) in agents.all() {
            if arguments.node.as_deref().is_some_and(|wanted| wanted != node.as_str()) {
                continue;
            }
            let text = client.text("/plan").await.with_context(|| format!("node {node} has no plan"))?;
            is_clean &= text.is_empty();
            let text = if text.is_empty() { "# nothing to change\n".to_owned() } else { text };
            print!("# {node}\n{text}");
        }
        Ok(if is_clean { ExitCode::SUCCESS } else { ExitCode::from(1) })
    })
}

/// Prints what is wrong on every node. Exit code 1 if anything is.
pub(crate) fn doctor(arguments: &DoctorArguments) -> Result<ExitCode, Failure> {
    block_on(async {
        let agents = arguments.cluster.agents().await?;
        let mut findings = Findings::default();
        for (node, client) in agents.all() {
            match client.text("/readyz").await {
                Ok(_) => {}
                Err(ClientError::Refused { message, .. }) => {
                    findings.add(node, &message, "look at the agent's log; it is ready once every table was listed");
                }
                Err(error) => {
                    findings.add(node, &error.to_string(), "start the agent; the data plane forwards meanwhile");
                    continue;
                }
            }
            let problems: Table = client.get("/tables/problems").await.context("the problems were not shown")?;
            for row in &problems.rows {
                if let [object, field, reason, hint] = row.as_slice() {
                    findings.add(node, &format!("{object}: {field}: {reason}"), hint);
                }
            }
            match client.text("/plan").await {
                Ok(plan) if plan.is_empty() => {}
                Ok(plan) => findings.add(
                    node,
                    &format!("the kernel is not as it must be:\n{plan}"),
                    "the agent mends this by itself within a second; if it stays, its log says why",
                ),
                Err(error) => findings.add(node, &error.to_string(), "look at the agent's log"),
            }
        }
        print!("{}", findings.render(agents.all().count()));
        Ok(if findings.0.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
    })
}

/// What is wrong, in the order in which it was found, each with the nodes that say so: what is wrong with
/// an object of the cluster is seen by all of them.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

#[derive(Debug)]
struct Finding {
    what: String,
    hint: String,
    nodes: Vec<String>,
}

impl Findings {
    fn add(&mut self, node: &NodeName, what: &str, hint: &str) {
        let known = self.0.iter_mut().find(|finding| (finding.what.as_str(), finding.hint.as_str()) == (what, hint));
        match known {
            Some(finding) => finding.nodes.push(node.to_string()),
            None => self.0.push(Finding { what: what.into(), hint: hint.into(), nodes: vec![node.to_string()] }),
        }
    }

    fn render(&self, nodes: usize) -> String {
        if self.0.is_empty() {
            return format!("no problems on {nodes} nodes\n");
        }
        let line = |finding: &Finding| {
            let on = match finding.nodes.len() {
                count if count > 1 && count == nodes => format!("all {nodes} nodes"),
                _ => finding.nodes.join(", "),
            };
            format!("{on}: {}\n  hint: {}\n", finding.what.trim_end(), finding.hint)
        };
        self.0.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_nodes_say_is_printed_once() {
        let mut findings = Findings::default();
        assert_eq!(findings.render(3), "no problems on 3 nodes\n");
        for node in ["a", "b", "c"] {
            findings.add(&node.into(), "Service x: taken", "change it");
        }
        findings.add(&"b".into(), "the kernel differs\n", "wait");
        findings.add(&"c".into(), "the kernel differs\n", "wait");
        assert_eq!(
            findings.render(3),
            "all 3 nodes: Service x: taken\n  hint: change it\nb, c: the kernel differs\n  hint: wait\n"
        );
    }
}
