//! Golden files: what a view prints in each form, in `cli/golden/NAME.txt`. Refresh them with `PERIGEE_UPDATE_GOLDEN=1`.

use std::path::Path;

use super::{Format, View};

/// Fails unless the file of this name has what `view` prints.
pub(crate) fn check(name: &str, view: &View) {
    check_text(name, &page(view));
}

/// Fails unless the file of this name has this text.
pub(crate) fn check_text(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("golden/{name}.txt"));
    if std::env::var_os("PERIGEE_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).expect("write the golden file");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == text,
        "cli/golden/{name}.txt is not what is printed: PERIGEE_UPDATE_GOLDEN=1\n{text}"
    );
}

fn page(view: &View) -> String {
    let render = |format| view.render(format, false);
    let text = render(Format::Text).expect("text");
    let mut page = format!("-o text\n{text}");
    let wide = render(Format::Wide).expect("text");
    // Most results have no more to show.
    if wide != text {
        page += &format!("\n-o wide\n{wide}");
    }
    let json = render(Format::Json).expect("JSON");
    let yaml = render(Format::Yaml).expect("YAML");
    let read: serde_json::Value = yaml_serde::from_str(&yaml).expect("YAML");
    assert_eq!(
        read,
        serde_json::from_str::<serde_json::Value>(&json).expect("JSON"),
        "YAML and JSON are the same document"
    );
    page += &format!("\n-o json\n{json}\n-o yaml\n{yaml}");
    if let Ok(names) = render(Format::Name) {
        page += &format!("\n-o name\n{names}");
    }
    page
}
