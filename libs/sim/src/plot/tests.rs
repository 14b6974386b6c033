use super::*;

fn plot(lines: Vec<(String, Vec<(f64, f64)>)>, logarithmic_x: bool) -> String {
    Plot {
        title: "a < b & c",
        x: "x",
        y: "y",
        logarithmic_x,
        lines,
    }
    .svg()
}

#[test]
fn points_are_where_the_axes_say() {
    let svg = plot(vec![("one".to_owned(), vec![(0.0, 0.0), (10.0, 5.0)])], false);
    assert!(svg.contains("points=\"60.0,315.0 490.0,30.0\""), "{svg}");
    assert!(svg.contains(">10</text>") && svg.contains(">5</text>"), "{svg}");
    assert!(svg.contains("a &lt; b &amp; c"), "{svg}");
}

#[test]
fn a_logarithmic_axis_begins_above_zero() {
    let svg = plot(
        vec![("one".to_owned(), vec![(0.0, 1.0), (1.0, 2.0), (100.0, 3.0)])],
        true,
    );
    assert!(svg.contains("points=\"60.0,125.0 490.0,30.0\""), "{svg}");
}

#[test]
fn pictures_are_put_below_each_other() {
    let plot = Plot {
        title: "one",
        x: "x",
        y: "y",
        logarithmic_x: false,
        lines: vec![("line".to_owned(), vec![(0.0, 1.0), (2.0, 3.0)])],
    };
    let svg = stacked(&[plot.clone(), plot]);
    assert!(
        svg.contains("viewBox=\"0 0 640 720\"") && svg.contains("<svg y=\"360\""),
        "{svg}"
    );
    assert_eq!(svg.matches("<polyline").count(), 2);
    assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
}

#[test]
fn nothing_and_one_point_are_drawn_too() {
    for lines in [vec![], vec![("one".to_owned(), vec![(3.0, 4.0)])]] {
        let svg = plot(lines, false);
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
    }
}
