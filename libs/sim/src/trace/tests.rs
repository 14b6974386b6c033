use super::*;

#[test]
fn a_line_is_a_request_and_only_full_blocks_are_in_its_chain() {
    let text =
        "{\"timestamp\": 1500, \"input_length\": 1100, \"output_length\": 7, \"hash_ids\": [0, 4, 5]}\n";
    let requests = parse(text, 512).expect("a trace");
    assert_eq!(
        requests,
        [Request {
            at: Duration::from_millis(1500),
            key: hash(0),
            chain: vec![hash(0), hash(4)],
            prompt_tokens: 1100,
            output_tokens: 7,
        }]
    );
}

#[test]
fn without_lengths_a_prompt_is_its_blocks() {
    let requests = parse("{\"timestamp\": 0, \"hash_ids\": [3, 1]}", 512).expect("a trace");
    assert_eq!((requests[0].prompt_tokens, requests[0].chain.len()), (1024, 2));
}

#[test]
fn what_is_no_request_is_named_by_its_line() {
    let good = "{\"timestamp\": 0, \"input_length\": 512, \"output_length\": 1, \"hash_ids\": [0]}\n";
    let cases = [
        ("nonsense", "expected"),
        ("{\"timestamp\": 0}", "hash_ids"),
        ("{\"timestamp\": 0, \"hash_ids\": []}", "empty"),
        (
            "{\"timestamp\": 0, \"input_length\": 513, \"hash_ids\": [1]}",
            "513 tokens in 1 blocks of 512",
        ),
        ("{\"timestamp\": -1, \"hash_ids\": [1]}", "negative"),
    ];
    for (line, reason) in cases {
        let error = parse(&format!("{good}{line}\n"), 512).expect_err(line);
        assert_eq!(error.line, 2);
        assert!(error.to_string().contains(reason), "{error}");
    }
}
