//! The rules of the house that the compiler does not enforce.

#![allow(missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a file that are not tests.
const FILE_LINES_MAX: usize = 600;

/// Written by programs: nobody reads them from top to bottom.
const GENERATED: &[&str] = &["libs/ucx-sys/src/bindings.rs"];

/// Who may import whom (`ARCHITECTURE.md`). Development dependencies are free.
const IMPORTS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("ucx-sys", &[]),
    ("proto", &["types"]),
    ("engine", &["types"]),
    ("node", &["types", "proto"]),
    ("transfer", &["types", "ucx-sys"]),
    ("client", &["types", "proto", "node", "transfer"]),
    ("kv-store", &["types", "proto", "node", "transfer"]),
    (
        "prefill-node",
        &["types", "proto", "node", "transfer", "engine", "kv-store"],
    ),
    (
        "decode-node",
        &["types", "proto", "node", "transfer", "engine", "kv-store"],
    ),
    (
        "router",
        &["types", "proto", "node", "engine", "client", "kv-store"],
    ),
    ("sim", &["types", "router", "kv-store"]),
];

/// Modules that decide. They take `now` and randomness as arguments and do no I/O.
const PURE: &[&str] = &[
    "libs/types/src",
    "libs/engine/src/sampler.rs",
    "libs/engine/src/detokenizer.rs",
    "kv-store/src/table.rs",
    "kv-store/src/log.rs",
    "kv-store/src/cooperate.rs",
    "kv-store/src/follower.rs",
    "kv-store/src/probe.rs",
    "router/src/index.rs",
    "router/src/cost.rs",
    "router/src/cost/learning.rs",
    "router/src/cost/steps.rs",
    "router/src/placement.rs",
    "router/src/decisions.rs",
    "router/src/decisions/reason.rs",
    "router/src/access.rs",
    "router/src/timeline.rs",
    "router/src/history.rs",
    "router/src/heat.rs",
    "router/src/admission.rs",
    "router/src/admission",
    "router/src/lengths.rs",
    "router/src/residents.rs",
    "router/src/tenants.rs",
    "prefill-node/src/schedule.rs",
    "prefill-node/src/handoff.rs",
    "decode-node/src/batch.rs",
    "decode-node/src/handoff.rs",
    "decode-node/src/output.rs",
];

/// What a pure module must not say.
const IMPURE: &[&str] = &[
    "tokio::",
    "tonic::",
    "async fn",
    ".await",
    "Instant::now",
    "SystemTime",
    "std::fs",
    "std::net",
    "std::thread",
    "std::env",
    "tracing::",
    "println!",
    "rand::",
];

const UNSAFE_CRATES: &[&str] = &["libs/ucx-sys", "libs/transfer", "libs/engine"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace holds this crate")
        .to_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn files(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("entry").path();
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && !["target", "models", "node_modules"].contains(&name.as_str()) {
                files(&path, extension, found);
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    files(&root(), "rs", &mut found);
    assert!(found.len() > 50, "the walk found only {} files", found.len());
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root())
        .expect("inside")
        .to_string_lossy()
        .into_owned()
}

fn is_test(path: &Path) -> bool {
    let path = relative(path);
    path.starts_with("tests/")
        || path.contains("/tests/")
        || path.ends_with("/tests.rs")
        || path.contains("/benches/")
}

/// The text without its inline `mod tests { … }`, which stands last in a file by convention.
fn without_inline_tests(text: &str) -> &str {
    text.split_once("#[cfg(test)]\nmod tests {")
        .map_or(text, |(code, _)| code)
}

fn manifests() -> BTreeMap<String, toml::Table> {
    let workspace: toml::Table = read(&root().join("Cargo.toml")).parse().expect("toml");
    let members = workspace["workspace"]["members"]
        .as_array()
        .expect("members")
        .iter();
    members
        .map(|member| {
            let manifest: toml::Table = read(&root().join(member.as_str().expect("path")).join("Cargo.toml"))
                .parse()
                .expect("toml");
            (
                manifest["package"]["name"].as_str().expect("name").to_owned(),
                manifest,
            )
        })
        .collect()
}

#[test]
fn crates_import_only_what_the_architecture_allows() {
    let manifests = manifests();
    let ours: BTreeSet<&str> = manifests.keys().map(String::as_str).collect();
    let rules: BTreeMap<&str, &[&str]> = IMPORTS.iter().copied().collect();
    for (name, manifest) in &manifests {
        let empty = toml::Table::new();
        let dependencies = manifest
            .get("dependencies")
            .and_then(toml::Value::as_table)
            .unwrap_or(&empty);
        let imported: BTreeSet<&str> = dependencies
            .keys()
            .map(String::as_str)
            .filter(|name| ours.contains(name))
            .collect();
        if name == "perigee" || name == "tests" {
            continue;
        }
        let allowed = rules
            .get(name.as_str())
            .unwrap_or_else(|| panic!("{name} has no import rule"));
        for import in imported {
            assert!(allowed.contains(&import), "{name} must not import {import}");
        }
    }
}

#[test]
fn every_crate_takes_the_workspace_lints() {
    for (name, manifest) in manifests() {
        assert_eq!(manifest["lints"]["workspace"].as_bool(), Some(true), "{name}");
    }
}

#[test]
fn pure_modules_stay_pure() {
    for entry in PURE {
        let path = root().join(entry);
        let mut found = Vec::new();
        if path.is_dir() {
            files(&path, "rs", &mut found);
        } else {
            found.push(path.clone());
            let parts = path.with_extension("");
            if parts.is_dir() {
                files(&parts, "rs", &mut found);
            }
        }
        for file in found.iter().filter(|file| !is_test(file)) {
            let text = read(file);
            for (number, line) in without_inline_tests(&text).lines().enumerate() {
                if line.trim_start().starts_with("//") {
                    continue;
                }
                for word in IMPURE {
                    assert!(
                        !line.contains(word),
                        "{}:{}: pure code says {word}",
                        relative(file),
                        number + 1
                    );
                }
            }
        }
    }
}

#[test]
fn no_file_outgrows_its_design() {
    for file in sources().iter().filter(|file| !is_test(file)) {
        let text = read(file);
        let lines = without_inline_tests(&text).lines().count();
        if GENERATED.contains(&relative(file).as_str()) {
            continue;
        }
        assert!(
            lines <= FILE_LINES_MAX,
            "{} has {lines} lines: find the seam",
            relative(file)
        );
    }
}

#[test]
fn every_file_says_what_it_is() {
    for file in sources().iter().filter(|file| !is_test(file)) {
        let text = read(file);
        assert!(
            text.trim_start().starts_with("//!"),
            "{} has no module documentation",
            relative(file)
        );
    }
}

#[test]
fn unsafe_code_stays_where_it_is_argued() {
    for file in sources() {
        let path = relative(&file);
        if is_test(&file) || UNSAFE_CRATES.iter().any(|folder| path.starts_with(folder)) {
            continue;
        }
        for (number, line) in read(&file).lines().enumerate() {
            let line = line.trim_start();
            let found =
                line.contains("unsafe {") || line.contains("unsafe fn") || line.contains("unsafe impl");
            assert!(
                !found || line.starts_with("//"),
                "{path}:{}: unsafe code outside its crates",
                number + 1
            );
        }
    }
}

#[test]
fn documents_link_to_files_that_exist() {
    let mut documents = Vec::new();
    files(&root(), "md", &mut documents);
    for document in documents {
        let text = read(&document);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or("");
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let path = document.parent().expect("folder").join(target);
            assert!(
                path.exists(),
                "{} links to {target}, which does not exist",
                relative(&document)
            );
        }
    }
}

#[test]
fn nothing_is_left_to_do_without_an_owner() {
    for file in sources() {
        if relative(&file) == "tests/tests/tidy.rs" {
            continue;
        }
        for (number, line) in read(&file).lines().enumerate() {
            let found = ["TODO", "FIXME", "XXX", "HACK"]
                .iter()
                .any(|word| line.contains(word));
            assert!(
                !found,
                "{}:{}: open an issue instead",
                relative(&file),
                number + 1
            );
        }
    }
}
