//! Cost over flows, as a picture.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, anyhow};
use plotters::prelude::*;

use super::Row;

const SIZE: (u32, u32) = (900, 520);

/// Writes an SVG of what packets of more and more flows cost.
///
/// # Errors
///
/// The file cannot be written.
pub(super) fn flows(rows: &[Row], path: &Path) -> Result<()> {
    let mut series = BTreeMap::<String, Vec<(f64, f64)>>::new();
    for row in rows.iter().filter(|row| row.group == "flows" || row.name.starts_with("one LRU")) {
        let name = row.name.rsplit_once(", ").map_or(row.name.as_str(), |(name, _)| name);
        series.entry(name.to_owned()).or_default().push((row.flows.into(), row.median));
    }
    draw(&series, path).map_err(|why| anyhow!("{why}")).with_context(|| path.display().to_string())
}

fn draw(
    series: &BTreeMap<String, Vec<(f64, f64)>>,
    path: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let top = series.values().flatten().map(|point| point.1).fold(0.0, f64::max) * 1.1;
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d((1.0..1_000_000.0_f64).log_scale(), 0.0..top)?;
    chart.configure_mesh().x_desc("flows").y_desc("nanoseconds per packet").draw()?;
    for (number, (name, points)) in series.iter().enumerate() {
        let color = Palette99::pick(number).to_rgba();
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3);
        chart
            .draw_series(line)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
