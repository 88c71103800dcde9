//! Small bar charts in rows, as one SVG that any browser shows, within Markdown too.

use std::fmt::Write as _;

/// A chart's size with its texts, in pixels.
const WIDE: f64 = 230.0;
const HIGH: f64 = 190.0;
/// What is left free on each side of the bars, above them and below them.
const SIDE: f64 = 15.0;
const ABOVE: f64 = 45.0;
const BELOW: f64 = 30.0;
/// One colour a row of charts. All texts are grey enough to read on white and on black.
const COLOURS: [&str; 2] = ["#2a7f8e", "#c4823d"];

/// One chart. Its bars begin at zero.
pub struct Panel {
    /// What is shown, by what.
    pub title: String,
    /// A label and a height.
    pub bars: Vec<(String, f64)>,
}

/// One row of charts below the other. The charts of a row have one scale.
pub fn plot(rows: &[&[Panel]]) -> String {
    let columns = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let (width, height) = (WIDE * columns as f64, HIGH * rows.len() as f64);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#777\" text-anchor=\"middle\">\n"
    );
    for (y, row) in rows.iter().enumerate() {
        let values = row.iter().flat_map(|panel| &panel.bars).map(|(_, value)| *value);
        let most = values.fold(f64::MIN_POSITIVE, f64::max);
        for (x, panel) in row.iter().enumerate() {
            let _ = writeln!(svg, "<g transform=\"translate({}, {})\">", x as f64 * WIDE, y as f64 * HIGH);
            draw(&mut svg, panel, most, COLOURS[y % COLOURS.len()]);
            svg.push_str("</g>\n");
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, panel: &Panel, most: f64, colour: &str) {
    let (middle, ground) = (WIDE / 2.0, HIGH - BELOW);
    text(svg, middle, 18.0, " font-weight=\"bold\"", &panel.title);
    let step = (WIDE - 2.0 * SIDE) / panel.bars.len().max(1) as f64;
    for (at, (label, value)) in panel.bars.iter().enumerate() {
        let (centre, wide) = (SIDE + step * (at as f64 + 0.5), step.min(80.0) * 0.6);
        let high = (ground - ABOVE) * value / most;
        let (left, top) = (centre - wide / 2.0, ground - high);
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{wide:.1}\" height=\"{high:.1}\" fill=\"{colour}\"/>"
        );
        text(svg, centre, top - 5.0, "", &format!("{value:.0}"));
        text(svg, centre, ground + 16.0, "", label);
    }
    let _ = writeln!(svg, "<path d=\"M{SIDE} {ground}H{}\" stroke=\"#777\"/>", WIDE - SIDE);
}

fn text(svg: &mut String, x: f64, y: f64, style: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\"{style}>{text}</text>");
}
