// SPDX-License-Identifier: MIT OR Apache-2.0

//! The results as SVG pictures.

use super::{
    early::{self, Sum},
    pairs::{RESEEDS, Results},
    report::{BIN, Report, number},
    save,
};
use anyhow::{Error, Result};
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};
use std::path::Path;
use suite::pairs::CONSUMERS;

const SIZE: (u32, u32) = (900, 420);
const OURS: RGBColor = RGBColor(0x1b, 0x6c, 0xa8);
const WITHOUT: RGBColor = RGBColor(0xc0, 0x39, 0x2b);
const PEERS: [(&str, RGBColor); 5] = [
    ("this driver", OURS),
    ("C, no barrier", RGBColor(0x7f, 0x8c, 0x8d)),
    ("mainline's", RGBColor(0x4d, 0x56, 0x56)),
    ("vmclock", RGBColor(0xd6, 0x89, 0x10)),
    ("the kernel", RGBColor(0xa2, 0xb5, 0xbd)),
];

/// The rows of the bar chart, with shorter names.
const BARS: [(&str, &str); 7] = [
    ("check of the mapped counter", "mapped check"),
    ("read of the counter", "read"),
    ("poll", "poll"),
    ("getrandom of 16 bytes, vDSO", "getrandom, vDSO"),
    ("getrandom of 16 bytes, system call", "getrandom, call"),
    ("open, mmap, touch, munmap, close", "open ... close"),
    ("notification until it is handled", "notification"),
];

pub fn draw(report: &Report, folder: &Path) -> Result<()> {
    write(folder, "calls.svg", |root| calls(report, root))?;
    write(folder, "restore.svg", |root| timelines(report, root))?;
    write(folder, "draws.svg", |root| draws(report, root))?;
    write(folder, "early.svg", |root| reseeds(report, root))
}

fn write(folder: &Path, name: &str, picture: impl Fn(&Root) -> Result<()>) -> Result<()> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(plot)?;
        picture(&root)?;
        root.present().map_err(plot)?;
    }
    let licence = "<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->\n";
    save(&folder.join(name), &format!("{licence}{svg}\n"))
}

type Root<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Converts an error of the library, which cannot be passed between threads.
fn plot(error: impl std::fmt::Display) -> Error {
    anyhow::anyhow!("cannot draw: {error}")
}

fn centred(size: u32) -> TextStyle<'static> {
    ("sans-serif", size)
        .into_font()
        .color(&BLACK)
        .pos(Pos::new(HPos::Center, VPos::Bottom))
}

/// A number for where there is little room.
fn short(value: f64) -> String {
    if value < 10_000.0 {
        return number(value);
    }
    format!("{:.1}k", value / 1e3)
}

/// Bars: what calls cost, on a logarithmic scale.
fn calls(report: &Report, root: &Root) -> Result<()> {
    let mut chart = ChartBuilder::on(root)
        .caption("What calls cost, in guest instructions", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0f64..BARS.len() as f64, (1f64..1_000_000f64).log_scale())
        .map_err(plot)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(0)
        .y_label_formatter(&|value| number(*value))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(plot)?;
    for (column, colour) in PEERS {
        let mut bars = Vec::new();
        let mut texts = Vec::new();
        for (n, (row, _)) in BARS.iter().enumerate() {
            let there: Vec<_> = PEERS
                .iter()
                .filter(|(column, _)| report.get(row, column).is_some())
                .collect();
            let Some(place) = there.iter().position(|(name, _)| *name == column) else {
                continue;
            };
            let value = report.get(row, column).unwrap_or_default();
            let width = 0.8 / there.len() as f64;
            let left = n as f64 + 0.1 + place as f64 * width;
            let bar = [(left, 1.0), (left + 0.9 * width, value.max(1.0))];
            bars.push(Rectangle::new(bar, colour.filled()));
            let at = (left + 0.45 * width, value.max(1.0) * 1.08);
            texts.push(Text::new(short(value), at, centred(11)));
        }
        chart
            .draw_series(bars)
            .map_err(plot)?
            .label(column)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled()));
        chart.draw_series(texts).map_err(plot)?;
    }
    // Below the axis, in the picture's own pixels.
    for (n, (_, name)) in BARS.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(n as f64 + 0.5, 1.0));
        root.draw(&Text::new(*name, (x, y + 18), centred(13)))
            .map_err(plot)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()
        .map_err(plot)
}

/// One line for each restore, with its events.
fn timelines(report: &Report, root: &Root) -> Result<()> {
    let last = report
        .timelines
        .iter()
        .flat_map(|timeline| timeline.events.values())
        .fold(1.0, |last: f64, &time| last.max(time));
    let lanes = report.timelines.len() as f64;
    let mut chart = ChartBuilder::on(root)
        .caption(
            "After a restore, in microseconds since the guest's clock runs again (as observed, TCG)",
            ("sans-serif", 20),
        )
        .margin(12)
        .margin_right(40)
        .x_label_area_size(30)
        .build_cartesian_2d(0f64..1.05 * last, 0f64..lanes)
        .map_err(plot)?;
    chart
        .configure_mesh()
        .disable_y_axis()
        .disable_y_mesh()
        .x_label_formatter(&|value| number(*value))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(plot)?;
    for (n, timeline) in report.timelines.iter().enumerate() {
        let y = lanes - n as f64 - 0.85;
        let (name, colour) = if timeline.barrier {
            ("with the barrier: read() first", OURS)
        } else {
            ("without", WITHOUT)
        };
        let line = PathElement::new([(0.0, y), (last, y)], colour.stroke_width(2));
        chart.draw_series([line]).map_err(plot)?;
        let at = (0.0, y + 0.75);
        let style = ("sans-serif", 16).into_font().color(&colour);
        chart
            .draw_series([Text::new(name, at, style)])
            .map_err(plot)?;
        let mut events: Vec<_> = timeline.events.iter().collect();
        events.sort_by(|a, b| a.1.total_cmp(b.1));
        for (height, (what, &time)) in events.into_iter().enumerate() {
            let top = y + 0.14 * (height as f64 + 1.0);
            let stem = PathElement::new([(time, y), (time, top)], colour.stroke_width(1));
            chart.draw_series([stem]).map_err(plot)?;
            let dot = Circle::new((time, y), 4, colour.filled());
            chart.draw_series([dot]).map_err(plot)?;
            let side = if time > 0.6 * last {
                HPos::Right
            } else {
                HPos::Left
            };
            let style = ("sans-serif", 13)
                .into_font()
                .color(&BLACK)
                .pos(Pos::new(side, VPos::Bottom));
            let text = format!("{what}: {}", number(time));
            chart
                .draw_series([Text::new(text, (time, top), style)])
                .map_err(plot)?;
        }
    }
    Ok(())
}

/// Lines: the share of a clone's draws that another clone also draws.
fn draws(report: &Report, root: &Root) -> Result<()> {
    // A bit more than the visible range.
    let bins = report.draws.iter().filter_map(|draws| {
        draws
            .same
            .iter()
            .rposition(|share| share.is_some_and(|share| share > 0.0))
    });
    let end = BIN * (bins.max().unwrap_or(0) as f64 * 1.3 + 4.0);
    let mut chart = ChartBuilder::on(root)
        .caption(
            "Of what clones draw from the kernel: how much another draws, too",
            ("sans-serif", 20),
        )
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0f64..end, 0f64..1.05)
        .map_err(plot)?;
    chart
        .configure_mesh()
        .x_desc("milliseconds since the process saw the counter change (as observed, TCG)")
        .y_label_formatter(&|value| format!("{:.0} %", 100.0 * value))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(plot)?;
    for draws in &report.draws {
        let (name, colour) = if draws.barrier {
            ("after the barrier", OURS)
        } else {
            ("without the barrier", WITHOUT)
        };
        let points = draws.same.iter().enumerate();
        let points = points
            .filter_map(|(n, share)| Some((BIN * n as f64, (*share)?)))
            .take_while(|(time, _)| *time <= end);
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(3)))
            .map_err(plot)?
            .label(format!("{name}, {} clones", draws.clones))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE)
        .draw()
        .map_err(plot)
}

/// Where "not at all" is on a logarithmic scale, in milliseconds.
const NEVER: f64 = 0.001;

/// Side by side, for each process: the share of the pairs of clones that have nothing in
/// common any more.
fn reseeds(report: &Report, root: &Root) -> Result<()> {
    let title = "Of two clones of a machine: the share of pairs that draw nothing alike any more";
    let root = root.titled(title, ("sans-serif", 20)).map_err(plot)?;
    let colours = [BLACK.mix(0.6), WITHOUT.mix(1.0), OURS.mix(1.0)];
    let panels = root.split_evenly((1, early::PROCESSES.len()));
    for (panel, process) in panels.iter().zip(early::PROCESSES) {
        let mut chart = ChartBuilder::on(panel)
            .caption(process, ("sans-serif", 14))
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(44)
            .build_cartesian_2d((NEVER..1000.0).log_scale(), 0f64..1.02)
            .map_err(plot)?;
        chart
            .configure_mesh()
            .x_desc("milliseconds after the restore (as observed, TCG)")
            .x_labels(7)
            .x_label_formatter(&|time| match *time <= NEVER {
                true => "0".into(),
                false => format!("{time}"),
            })
            .y_label_formatter(&|share| format!("{:.0} %", 100.0 * share))
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(plot)?;
        for (driver, colour) in early::DRIVERS.into_iter().zip(colours) {
            let cells = report.early.iter();
            let sum =
                Sum::of(cells.filter(|cell| cell.driver == driver && cell.process == process));
            if sum.pairs == 0 {
                continue;
            }
            let mut points = Vec::new();
            for (n, time) in sum.times.iter().enumerate() {
                let time = time.max(NEVER);
                points.push((time, n as f64 / sum.pairs as f64));
                points.push((time, (n + 1) as f64 / sum.pairs as f64));
            }
            points.push((1000.0, 1.0));
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))
                .map_err(plot)?
                .label(driver)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 12, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .border_style(BLACK.mix(0.3))
            .background_style(WHITE)
            .draw()
            .map_err(plot)?;
    }
    Ok(())
}

/// The picture of `make pairs`: for what reseeds, the share of the pairs of clones in which a draw of a
/// consumer was alike.
pub fn pairs(results: &Results, folder: &Path) -> Result<()> {
    write(folder, "pairs.svg", |root| shares(results, root))
}

fn shares(results: &Results, root: &Root) -> Result<()> {
    let title =
        "Pairs of clones in which a draw was alike: a snapshot at a random moment, two restores";
    let root = root.titled(title, ("sans-serif", 20)).map_err(plot)?;
    let panels = root.split_evenly((1, RESEEDS.len()));
    for (panel, (_, name, _)) in panels.iter().zip(RESEEDS) {
        let sum = results.sum(name);
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("{name}: {} pairs", sum.pairs), ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(44)
            .build_cartesian_2d(0f64..CONSUMERS.len() as f64, 0f64..1.05)
            .map_err(plot)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_label_formatter(&|share| format!("{:.0} %", 100.0 * share))
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(plot)?;
        let (mut bars, mut texts) = (Vec::new(), Vec::new());
        for (n, alike) in sum.alike.into_iter().enumerate() {
            let share = f64::from(alike) / f64::from(sum.pairs.max(1));
            let middle = n as f64 + 0.5;
            let bar = [(middle - 0.3, 0.0), (middle + 0.3, share)];
            bars.push(Rectangle::new(bar, WITHOUT.filled()));
            texts.push(Text::new(
                alike.to_string(),
                (middle, share + 0.01),
                centred(13),
            ));
        }
        chart.draw_series(bars).map_err(plot)?;
        chart.draw_series(texts).map_err(plot)?;
        // Below the axis, in the picture's own pixels.
        for (n, name) in CONSUMERS.into_iter().enumerate() {
            let (x, y) = chart.backend_coord(&(n as f64 + 0.5, 0.0));
            root.draw(&Text::new(name, (x, y - 5), centred(11)))
                .map_err(plot)?;
        }
    }
    Ok(())
}
