//! Lines over two axes, as SVG.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 45.0;
/// About how many marks an axis gets.
const MARKS: f64 = 6.0;
const COLOURS: [&str; 7] = ["#c33", "#48c", "#2a2", "#777", "#b80", "#85c", "#0aa"];

/// A picture of some lines.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot<'a> {
    /// Above it.
    pub title: &'a str,
    /// Below the horizontal axis.
    pub x: &'a str,
    /// Beside the vertical axis.
    pub y: &'a str,
    /// Whether the horizontal axis is logarithmic. It then begins with the least value above 0.
    pub logarithmic_x: bool,
    /// The lines: their names and points.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

/// Pictures below each other, as one.
pub fn stacked(plots: &[Plot<'_>]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {}\">\n",
        HEIGHT * plots.len() as f64
    );
    for (index, plot) in plots.iter().enumerate() {
        let place = format!(
            "<svg y=\"{}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" ",
            HEIGHT * index as f64
        );
        svg += &plot.svg().replacen("<svg ", &place, 1);
    }
    svg + "</svg>\n"
}

/// One axis: values and where they are drawn.
struct Axis {
    least: f64,
    most: f64,
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Plot<'_> {
    /// The picture. Equal plots give equal text.
    pub fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|(_, points)| points.iter().copied());
        let x = Axis::of(
            points().map(|(x, _)| x),
            (LEFT, WIDTH - RIGHT),
            self.logarithmic_x,
            false,
        );
        let y = Axis::of(points().map(|(_, y)| y), (HEIGHT - BOTTOM, TOP), false, true);
        let mut svg = String::new();
        // Writing to a string does not fail.
        let _ = self.draw(&mut svg, &x, &y);
        svg
    }

    fn draw(&self, svg: &mut String, x: &Axis, y: &Axis) -> std::fmt::Result {
        writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"11\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
             <text x=\"{LEFT}\" y=\"18\" font-size=\"13\">{}</text>",
            escaped(self.title)
        )?;
        for mark in y.marks() {
            let at = y.place(mark);
            writeln!(
                svg,
                "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\n\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0,
                label(mark)
            )?;
        }
        for mark in x.marks() {
            writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                x.place(mark),
                HEIGHT - BOTTOM + 16.0,
                label(mark)
            )?;
        }
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n\
             <text transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 10.0,
            escaped(self.x),
            (TOP + HEIGHT - BOTTOM) / 2.0,
            escaped(self.y)
        )?;
        for (index, (name, points)) in self.lines.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let drawn = points
                .iter()
                .filter(|(at, _)| *at >= x.least)
                .map(|(at, value)| format!("{:.1},{:.1}", x.place(*at), y.place(*value)));
            writeln!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>\n\
                 <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
                drawn.collect::<Vec<_>>().join(" "),
                WIDTH - RIGHT + 10.0,
                TOP + 10.0 + 16.0 * index as f64,
                escaped(name)
            )?;
        }
        writeln!(svg, "</svg>")
    }
}

impl Axis {
    fn of(
        values: impl Iterator<Item = f64>,
        (from, to): (f64, f64),
        logarithmic: bool,
        from_zero: bool,
    ) -> Self {
        let drawn = values.filter(|value| value.is_finite() && (!logarithmic || *value > 0.0));
        let (least, most) = drawn.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| {
            (least.min(value), most.max(value))
        });
        let least = if from_zero { least.min(0.0) } else { least };
        // Nothing, or one value: any range will do.
        let (least, most) = if least < most {
            (least, most)
        } else {
            (least.min(1.0), least.min(1.0) + 1.0)
        };
        Self {
            least,
            most,
            from,
            to,
            logarithmic,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value / self.least).ln() / (self.most / self.least).ln()
        } else {
            (value - self.least) / (self.most - self.least)
        };
        self.from + share * (self.to - self.from)
    }

    fn marks(&self) -> Vec<f64> {
        if self.logarithmic {
            let powers = self.least.log10().floor() as i32..=self.most.log10().ceil() as i32;
            let marks = powers.flat_map(|power| [1.0, 3.0].map(|digit| digit * 10f64.powi(power)));
            return marks
                .filter(|mark| (self.least..=self.most).contains(mark))
                .collect();
        }
        let rough = (self.most - self.least) / MARKS;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|digit| digit * unit)
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(10.0 * unit);
        let first = (self.least / step).ceil() as i64;
        let last = (self.most / step).floor() as i64;
        (first..=last).map(|number| number as f64 * step).collect()
    }
}

/// At most three decimals, and no zeros at the end.
fn label(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests;
