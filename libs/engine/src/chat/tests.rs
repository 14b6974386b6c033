use rstest::rstest;
use serde_json::{Value as Json, json};

use super::*;

fn render(source: &str, messages: Json) -> Result<String, ChatError> {
    let options = ChatOptions {
        add_generation_prompt: true,
        now_unix_s: 1_795_392_000,
        ..ChatOptions::default()
    };
    ChatTemplate::new(source, "<s>", "</s>")?.render(messages.as_array().unwrap(), &options)
}

#[rstest]
#[case::trims_blocks("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\ny", "x\ny")]
#[case::special_tokens("{{ bos_token }}-{{ eos_token }}", "<s>-</s>")]
#[case::absent_is_none("{{ tools is none }}{{ documents is not none }}", "TrueFalse")]
#[case::tojson(
    "{{ {'b': [1, 2.5, none], 'a': '<é>'} | tojson }}",
    "{\"b\": [1, 2.5, null], \"a\": \"<é>\"}"
)]
#[case::tojson_indented("{{ {'b': [1]} | tojson(indent=4) }}", "{\n    \"b\": [\n        1\n    ]\n}")]
#[case::date("{{ strftime_now('%d %b %Y, %A') }}", "23 Nov 2026, Monday")]
#[case::strip(
    "{{ ' x '.strip() }}{{ 'xxaxx'.strip('x') }}{{ ' y'.lstrip() }}{{ 'z\n'.rstrip() }}",
    "xayz"
)]
#[case::split(
    "{{ 'a</think>b'.split('</think>')[-1] }}{{ ' a  b c '.split() }}",
    "b['a', 'b', 'c']"
)]
#[case::split_limit(
    "{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}",
    "['a', 'b,c']['a,b', 'c']"
)]
#[case::affixes(
    "{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'bc')) }}{{ 'a'.startswith('b') }}",
    "TrueTrueFalse"
)]
#[case::cases(
    "{{ 'aB c'.upper() }}{{ 'aB'.lower() }}{{ 'aB c'.title() }}{{ 'aB'.capitalize() }}",
    "AB CabAb CAb"
)]
#[case::replace("{{ 'aaa'.replace('a', 'b') }}{{ 'aaa'.replace('a', 'b', 1) }}", "bbbbaa")]
#[case::find(
    "{{ 'éab'.find('b') }}{{ 'a'.find('x') }}{{ 'aba'.rfind('a') }}{{ 'aba'.count('a') }}",
    "2-122"
)]
#[case::items(
    "{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}{{ v }}{% endfor %}",
    "x1y2"
)]
#[case::get(
    "{{ {'x': 1}.get('x') }}{{ {'x': 1}.get('z', 5) }}{{ {}.get('z') is none }}",
    "15True"
)]
#[case::keys("{{ {'x': 1}.keys() | list }}{{ {'x': 1}.values() | list }}", "['x'][1]")]
#[case::join("{{ ', '.join(['a', 'b']) }}", "a, b")]
#[case::namespace(
    "{% set n = namespace(x=1) %}{% for i in [1, 2] %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}",
    "4"
)]
#[case::break_(
    "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "1"
)]
#[case::slices("{{ messages[1:] | length }}{{ messages[0].role }}", "1system")]
fn templates_render_as_in_jinja(#[case] source: &str, #[case] expected: &str) {
    let messages = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]);
    assert_eq!(render(source, messages).unwrap(), expected);
}

#[test]
fn a_template_can_refuse() {
    let source = "{{ raise_exception('roles must alternate') }}";
    assert_eq!(
        render(source, json!([])).unwrap_err(),
        ChatError::Refused("roles must alternate".into())
    );
    let nested = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
    assert_eq!(
        render(nested, json!([])).unwrap_err(),
        ChatError::Refused("deep".into())
    );
}

#[rstest]
#[case::loops("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")]
#[case::growth(
    "{% set n = namespace(x='x' * 1000) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)]
#[case::output(
    "{% for a in range(99999) %}{% for b in range(999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}"
)]
fn a_hostile_template_ends(#[case] source: &str) {
    assert_eq!(render(source, json!([])).unwrap_err(), ChatError::TooExpensive);
}

#[test]
fn recursion_ends() {
    let source = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(matches!(
        render(source, json!([])).unwrap_err(),
        ChatError::Failed(_)
    ));
}

#[rstest]
#[case("{% if %}")]
#[case("{{ unclosed")]
#[case(&"{{ ".repeat(100_000))]
#[case(&format!("{{{{ {}", "(".repeat(100_000)))]
#[case(&"{% if true %}".repeat(100_000))]
fn invalid_syntax_is_found_at_once(#[case] source: &str) {
    assert!(matches!(
        ChatTemplate::new(source, "", "").unwrap_err(),
        ChatError::Syntax(_)
    ));
}

#[rstest]
#[case("{{ messages[0].content.nothing() }}")]
#[case("{{ messages[0].missing.field }}")]
#[case("{{ strftime_now('%Q') }}")]
#[case("{{ 'a'.split('') }}")]
fn a_failure_is_the_requests_fault(#[case] source: &str) {
    let error = render(source, json!([{"role": "user", "content": "x"}])).unwrap_err();
    assert!(matches!(error, ChatError::Failed(_)), "{error}");
    let error = types::Error::from(error);
    assert_eq!(
        (error.code, error.param.as_deref()),
        (ErrorCode::Invalid, Some("messages"))
    );
}

#[rstest]
#[case(0, "1970-01-01 00:00:00 Thursday")]
#[case(951_782_400, "2000-02-29 00:00:00 Tuesday")]
#[case(1_709_251_199, "2024-02-29 23:59:59 Thursday")]
#[case(4_107_542_400, "2100-03-01 00:00:00 Monday")]
#[case(u64::MAX, "9999-12-31 23:59:59 Friday")]
fn dates_are_gregorian(#[case] unix_s: u64, #[case] expected: &str) {
    assert_eq!(clock::format_utc(unix_s, "%F %T %A").unwrap(), expected);
}

#[test]
fn variables_reach_the_template() {
    let template = ChatTemplate::new("{{ tools[0].name }}{{ messages | length }}", "", "").unwrap();
    let variables = json!({"tools": [{"name": "clock"}], "messages": "cannot be replaced"});
    let options = ChatOptions {
        variables: variables.as_object().unwrap().clone(),
        ..ChatOptions::default()
    };
    assert_eq!(template.render(&[json!({})], &options).unwrap(), "clock1");
}
