use clap::ValueEnum;
use serde_json::json;
use types::ErrorCode;

use super::*;

fn view() -> View {
    View::new(json!({ "nodes": ["a", "b"] }), |wide| {
        let mut table = Columns::new(wide, &[("NODE", false), ("STATE", false), ("EPOCH", true)]);
        table.row(["a".to_owned(), paint(Tone::Good, "ready"), "7".to_owned()]);
        table.row(["b".to_owned(), paint(Tone::Bad, "lost"), "8".to_owned()]);
        table.text()
    })
    .named(["a", "b"])
}

#[test]
fn a_view_is_printed_in_each_form() {
    golden::check("view", &view());
}

#[test]
fn a_form_has_the_names_that_people_know_it_by() {
    for (name, format) in [
        ("table", Format::Text),
        ("text", Format::Text),
        ("wide", Format::Wide),
    ] {
        assert_eq!(Format::from_str(name, false), Ok(format));
    }
}

#[test]
fn results_that_stream_are_told_apart() {
    let next = |format: Format| format.next(&view(), false).expect("printed");
    assert_eq!(next(Format::Json).lines().count(), 1);
    assert!(
        next(Format::Yaml).starts_with("---\nnodes:\n"),
        "{}",
        next(Format::Yaml)
    );
}

#[test]
fn names_are_refused_where_there_are_none() {
    let error = View::line(json!({}), "done").render(Format::Name, false);
    let error = error.expect_err("no names");
    let error = error.downcast_ref::<Error>().expect("typed");
    assert_eq!(error.code, ErrorCode::Invalid);
    assert_eq!(Format::Name.without_names().as_ref(), Err(error));
    assert_eq!(Format::Json.without_names(), Ok(()));
}

#[test]
fn colours_change_nothing_but_the_colour() {
    let text = |colours| view().render(Format::Wide, colours).expect("text");
    let plain = text(false);
    assert!(plain.is_ascii(), "{plain:?}");
    let coloured = text(true);
    assert!(coloured.contains("\x1b[32mready\x1b[0m"), "{coloured:?}");
    assert!(coloured.contains("\x1b[31mlost\x1b[0m"), "{coloured:?}");
    let mut stripped = coloured;
    for sequence in ["\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m"] {
        stripped = stripped.replace(sequence, "");
    }
    assert_eq!(stripped, plain);
    let columns: Vec<Option<usize>> = plain.lines().map(|line| line.find(['7', '8'])).collect();
    assert_eq!(columns[1], columns[2], "marks have no width:\n{plain}");
}
