//! Draws figures of Services over their number, a line for each mode and one for the peer.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, bail};
use plotters::prelude::*;
use serde_json::Value;

const WIDTH: u32 = 960;
const HEIGHT: u32 = 720;
const FONT: (&str, u32) = ("sans-serif", 13);
const TITLE: (&str, u32) = ("sans-serif", 16);

/// What the peer's line is called.
const PEER: &str = "kube-proxy 1.20.2, iptables-legacy";

/// The figures of one plot: by line, what was measured at how many Services.
type Lines = BTreeMap<String, BTreeMap<u32, f64>>;

/// Reads what a run with `--json` printed, and writes the picture beside it.
pub(super) fn run(file: &str) -> anyhow::Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {file}"))?;
    let report: Value = serde_json::from_str(&text).with_context(|| format!("{file} is no output of --json"))?;
    let rows = report["figures"].as_array().with_context(|| format!("{file} has no list `figures`"))?;
    let mut figures: BTreeMap<&str, Lines> = BTreeMap::new();
    for row in rows {
        let (Some(figure), Some(mode), Some(services)) =
            (row["figure"].as_str(), row["mode"].as_str(), row["services"].as_u64())
        else {
            continue;
        };
        let services = u32::try_from(services)?;
        let lines = figures.entry(figure).or_default();
        for (line, value) in [(mode, &row["ours"]), (PEER, &row["peer"])] {
            if let Some(value) = value.as_f64().filter(|value| *value > 0.0) {
                lines.entry(line.to_owned()).or_default().insert(services, value);
            }
        }
    }
    if figures.is_empty() {
        bail!("{file} has no figures of Services: run `cargo xtask bench services --json`");
    }
    draw(&Path::new(file).with_extension("svg"), &figures)
}

fn draw(path: &Path, figures: &BTreeMap<&str, Lines>) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, (WIDTH, HEIGHT)).into_drawing_area();
    area.fill(&WHITE)?;
    let panels = area.split_evenly((figures.len().div_ceil(2), 2));
    let names: Vec<&String> = {
        let mut names: Vec<&String> = figures.values().flat_map(BTreeMap::keys).collect();
        names.sort();
        names.dedup();
        names
    };
    for (panel, (title, lines)) in panels.iter().zip(figures) {
        let points = || lines.values().flatten();
        let sizes = span(points().map(|(services, _)| f64::from(*services)), 0.1);
        // Above the lines is room for their names.
        let values = span(points().map(|(_, value)| *value), 0.6);
        let mut chart = ChartBuilder::on(panel)
            .caption(title, TITLE)
            .margin(10)
            .x_label_area_size(34)
            .y_label_area_size(58)
            .build_cartesian_2d(sizes.log_scale(), values.log_scale())?;
        chart
            .configure_mesh()
            .x_desc("Services of 10 endpoints")
            .x_labels(4)
            .y_labels(12)
            .x_label_formatter(&|value| format!("{value:.0}"))
            .y_label_formatter(&|value| format!("{value}"))
            .label_style(FONT)
            .light_line_style(WHITE.mix(0.0))
            .draw()?;
        for (index, name) in names.iter().enumerate() {
            let Some(line) = lines.get(*name) else { continue };
            let color = Palette99::pick(index).to_rgba();
            let points: Vec<(f64, f64)> = line.iter().map(|(services, value)| (f64::from(*services), *value)).collect();
            chart
                .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
                .label(name.as_str())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
            chart.draw_series(points.into_iter().map(|point| Circle::new(point, 3, color.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.7))
            .label_font(FONT)
            .draw()?;
    }
    area.present().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// From the least to the most, with room above that is such a part of what lies between, on a logarithmic scale.
fn span(values: impl Iterator<Item = f64> + Clone, room: f64) -> Range<f64> {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    let most = values.fold(0.0, f64::max);
    least / 1.2..most * (most / least).max(2.0).powf(room)
}
