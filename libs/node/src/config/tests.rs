use proptest::prelude::*;
use rstest::rstest;
use serde::Deserialize;

use super::*;

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Raw {
    decode: Decode,
    log: Log,
    peers: Vec<String>,
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Decode {
    batch_max: usize,
    step_deadline: Duration,
    pool: ByteSize,
    ratio: f64,
    name: Option<String>,
    threads: Option<usize>,
    stream: bool,
}

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Log {
    filter: String,
    hosts: Vec<String>,
}

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Rule {
    limit: u32,
}

impl Default for Decode {
    fn default() -> Self {
        Self {
            batch_max: 16,
            step_deadline: Duration::from_millis(50),
            pool: ByteSize::from_mib(64),
            ratio: 0.5,
            name: None,
            threads: None,
            stream: true,
        }
    }
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = pairs.iter();
    pairs
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn from(
    file: &str,
    environment: &[(&str, &str)],
    flags: &[(&str, &str)],
) -> Result<Loaded<Raw>, ConfigError> {
    layer(&Layers {
        file: Some(("perigee.toml", file)),
        environment: pairs(environment),
        flags: pairs(flags),
    })
}

#[test]
fn without_layers_the_defaults_hold() {
    let loaded = layer::<Raw>(&Layers::default()).expect("loads");
    assert_eq!(loaded.value, Raw::default());
    assert!(loaded.unknown_keys.is_empty() && loaded.sources.is_empty());
}

#[test]
fn each_layer_goes_over_the_one_below() {
    let file = "peers = [\"a\"]\n[decode]\nbatch_max = 1\nratio = 1.5\npool = \"1GiB\"\n";
    let environment = [
        ("PERIGEE_DECODE__BATCH_MAX", "2"),
        ("PERIGEE_DECODE__STEP_DEADLINE", "2s"),
        ("HOME", "/root"),
    ];
    let loaded = from(file, &environment, &[("decode.batch_max", "3")]).expect("loads");
    let Decode {
        batch_max,
        step_deadline,
        pool,
        ratio,
        name: None,
        threads: None,
        stream: true,
    } = loaded.value.decode
    else {
        panic!("what no layer names keeps its default: {:?}", loaded.value.decode);
    };
    assert_eq!((batch_max, ratio), (3, 1.5));
    assert_eq!(
        (step_deadline, pool),
        (Duration::from_secs(2), ByteSize::from_mib(1024))
    );
    assert_eq!(loaded.value.peers, ["a"]);
    let source = |key: &str| loaded.sources.get(key).cloned();
    assert_eq!(source("decode.batch_max"), Some(Source::Flag));
    let variable = "PERIGEE_DECODE__STEP_DEADLINE".to_owned();
    assert_eq!(
        source("decode.step_deadline"),
        Some(Source::Environment(variable))
    );
    assert_eq!(
        source("decode.ratio"),
        Some(Source::File("perigee.toml".to_owned()))
    );
    assert_eq!(source("decode.stream"), None);
    assert!(loaded.unknown_keys.is_empty());
}

/// The environment has text only; the field decides what it means.
#[rstest]
#[case("decode.name", "007", |raw: Raw| raw.decode.name.as_deref() == Some("007"))]
#[case("decode.name", "true", |raw: Raw| raw.decode.name.as_deref() == Some("true"))]
#[case("decode.name", "a = b\nc", |raw: Raw| raw.decode.name.as_deref() == Some("a = b\nc"))]
#[case("decode.threads", "4", |raw: Raw| raw.decode.threads == Some(4))]
#[case("decode.ratio", "2", |raw: Raw| raw.decode.ratio == 2.0)]
#[case("decode.stream", "false", |raw: Raw| !raw.decode.stream)]
#[case("decode.pool", "4096", |raw: Raw| raw.decode.pool == ByteSize(4096))]
#[case("log.filter", "12", |raw: Raw| raw.log.filter == "12")]
#[case("log.hosts", "a, b,c", |raw: Raw| raw.log.hosts == ["a", "b", "c"])]
#[case("log.hosts", "[\"a\"]", |raw: Raw| raw.log.hosts == ["a"])]
#[case("log.hosts", "7", |raw: Raw| raw.log.hosts == ["7"])]
fn text_becomes_what_the_field_takes(#[case] key: &str, #[case] text: &str, #[case] holds: fn(Raw) -> bool) {
    let variable = format!("PERIGEE_{}", key.to_uppercase().replace('.', "__"));
    let from_environment = from("", &[(&variable, text)], &[]).expect("loads");
    let from_flag = from("", &[], &[(key, text)]).expect("loads");
    assert_eq!(from_environment.value, from_flag.value);
    assert!(holds(from_flag.value.clone()), "{:?}", from_flag.value);
    assert!(from_flag.unknown_keys.is_empty());
}

#[test]
fn unknown_keys_are_reported_with_what_was_meant() {
    let file = "[decode]\nbatch_size = 1\nstep_dedline = \"1s\"\n[colour]\nred = 1\n[[rules]]\nlimt = 3\n";
    let loaded = from(file, &[("PERIGEE_LOG__FLTER", "info")], &[("verbose", "1")]).expect("loads");
    assert_eq!(
        loaded.unknown_keys,
        [
            "colour (perigee.toml)",
            "decode.batch_size (perigee.toml)",
            "decode.step_dedline (perigee.toml), did you mean step_deadline?",
            "log.flter (environment variable PERIGEE_LOG__FLTER), did you mean filter?",
            "rules[0].limt, did you mean limit?",
            "verbose (flag)",
        ]
    );
}

#[rstest]
#[case::syntax("[decode]\nbatch_max = = 1\n", 2, "")]
#[case::kind("\n[decode]\n\nbatch_max = \"many\"\n", 4, "expected usize")]
#[case::unit("[decode]\nstep_deadline = \"fast\"\n", 2, "no duration")]
#[case::bare_duration("[decode]\nstep_deadline = 5\n", 2, "expected a string")]
#[case::size("[decode]\nstream = true\npool = \"4 potatoes\"\n", 3, "no size")]
#[case::negative("[decode]\npool = -1\n", 2, "negative")]
fn an_error_in_the_file_names_its_line(#[case] file: &str, #[case] line: usize, #[case] says: &str) {
    let error = from(file, &[], &[]).expect_err("must be refused");
    let text = error.to_string();
    assert!(text.starts_with(&format!("perigee.toml:{line}: ")), "{text}");
    assert!(text.contains(says), "{text}");
    assert_eq!(error.code(), ErrorCode::Invalid);
}

#[test]
fn an_error_elsewhere_names_its_origin() {
    let error = from("", &[("PERIGEE_DECODE__BATCH_MAX", "many")], &[]).expect_err("must be refused");
    let text = error.to_string();
    assert!(
        text.contains("PERIGEE_DECODE__BATCH_MAX sets decode.batch_max to \"many\""),
        "{text}"
    );
    let error = from("", &[], &[("decode.batch_max.deeper", "1")]).expect_err("must be refused");
    assert!(
        error.to_string().contains("flag sets decode.batch_max.deeper"),
        "{error}"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error =
        load::<Raw>(Some(Path::new("/nowhere/perigee.toml")), Vec::new()).expect_err("must be refused");
    assert!(error.to_string().contains("/nowhere/perigee.toml"), "{error}");
    assert_eq!(error.code(), ErrorCode::NotFound);
}

#[test]
fn a_file_is_read_and_an_oversized_one_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("perigee.toml");
    std::fs::write(&path, "[decode]\nbatch_max = 5\n").expect("writes");
    let loaded = load::<Raw>(Some(&path), Vec::new()).expect("loads");
    assert_eq!(loaded.value.decode.batch_max, 5);
    let oversized = " ".repeat(usize::try_from(FILE_BYTES_MAX).expect("small") + 1);
    std::fs::write(&path, oversized).expect("writes");
    let error = load::<Raw>(Some(&path), Vec::new()).expect_err("must be refused");
    assert!(matches!(error, ConfigError::TooLarge { .. }), "{error}");
}

#[rstest]
#[case("4096", 4096)]
#[case("4KiB", 4096)]
#[case("4 kib", 4096)]
#[case("2GB", 2_000_000_000)]
#[case("7B", 7)]
#[case("0", 0)]
fn sizes_are_read(#[case] text: &str, #[case] bytes: u64) {
    assert_eq!(text.parse(), Ok(ByteSize(bytes)));
}

#[rstest]
#[case("")]
#[case("MiB")]
#[case("1.5MiB")]
#[case("-1")]
#[case("18446744073709551616")]
#[case("16777216TiB")]
fn sizes_that_make_no_sense_are_refused(#[case] text: &str) {
    text.parse::<ByteSize>().expect_err("must be refused");
}

proptest! {
    #[test]
    fn units_read_as_they_show(bytes: u64, shift in 0_u32..41, millis: u64) {
        for bytes in [bytes, (bytes >> 24) << shift.min(24), 1 << shift] {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
        let duration = Duration::from_millis(millis);
        prop_assert_eq!(duration.to_string().parse(), Ok(duration));
    }

    #[test]
    fn no_text_breaks_the_loader(key in "[a-z_.]{0,12}", text in any::<String>(), file in any::<String>()) {
        let _ = from("", &[], &[(&key, &text)]);
        let _ = from(&file, &[], &[]);
    }
}
