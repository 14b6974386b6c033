use proptest::prelude::*;
use rstest::rstest;

use super::*;

fn of(key: &str, rest: &str) -> String {
    format!("{} = {{ {rest} }}", hex(&digest(key)))
}

#[test]
fn a_key_is_found_by_what_it_hashes_to() {
    let text = format!(
        "# The evaluation.\n{}\n\n{}\n",
        of("one", "tenant = \"a\", expires = 2027-01-31"),
        of("two", "role = \"admin\""),
    );
    let keys = Keys::parse(&text).expect("valid");
    assert_eq!(keys.len(), 2);
    let one = keys.find("one").expect("listed");
    assert_eq!((one.tenant.as_str(), one.role), ("a", KeyRole::Client));
    assert_eq!(one.expires_unix_s, Some(1_801_353_600));
    assert_eq!(keys.find("two").expect("listed").role, KeyRole::Admin);
    for unknown in ["", "on", "one ", "three", &hex(&digest("one"))] {
        assert_eq!(keys.find(unknown), None);
    }
    assert!(Keys::parse("").expect("valid").is_empty());
}

#[test]
fn the_hash_is_that_of_every_other_tool() {
    // printf password | sha256sum
    assert_eq!(
        hex(&digest("password")),
        "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"
    );
}

#[rstest]
#[case("sk-in-the-clear = { tenant = \"a\" }", "no SHA-256")]
#[case(&of("k", "tenant = 7"), "invalid type")]
#[case(&of("k", "tenant = \"a\", expire = 2027-01-31"), "unknown field `expire`")]
#[case(&of("k", "role = \"root\""), "unknown variant `root`")]
#[case(&of("k", ""), "tenant = \"NAME\" is missing")]
#[case(&of("k", "role = \"admin\", tenant = \"a\""), "of no tenant")]
#[case(&of("k", "tenant = \"a\", expires = 12:00:00"), "expires is no date")]
#[case(&format!("{}\n{}", of("k", "tenant = \"a\""), of("k", "tenant = \"b\"")), "duplicate key")]
fn a_bad_line_is_refused_with_its_number(#[case] text: &str, #[case] says: &str) {
    let shifted = format!("\n# a comment\n{text}\n");
    let error = Keys::parse(&shifted).expect_err("bad");
    assert_eq!(error.code, ErrorCode::Invalid);
    assert!(error.message.contains(says), "{error}");
    let line = if text.contains('\n') { "line 4" } else { "line 3" };
    assert!(error.message.starts_with(line), "{error}");
    assert!(!error.message.contains("sk-in-the-clear"), "{error}");
}

#[test]
fn a_tenant_and_a_list_that_are_too_long_are_refused() {
    let long = of("k", &format!("tenant = \"{}\"", "a".repeat(TENANT_BYTES_MAX + 1)));
    assert!(
        Keys::parse(&long)
            .expect_err("long")
            .message
            .contains("256 bytes")
    );
    let many: Vec<String> = (0..=KEYS_MAX)
        .map(|index| of(&index.to_string(), "tenant = \"a\""))
        .collect();
    let error = Keys::parse(&many.join("\n")).expect_err("many");
    assert!(error.message.contains("at most 4096"), "{error}");
}

#[rstest]
#[case("1970-01-02", 86_400)]
#[case("2000-02-29", 951_782_400)]
#[case("2026-11-27T06:24:44Z", 1_795_760_684)]
#[case("2026-11-27T08:24:44+02:00", 1_795_760_684)]
#[case("2026-11-27T06:24:44", 1_795_760_684)]
fn an_expiry_is_a_date_or_a_time_of_any_zone(#[case] expires: &str, #[case] seconds: u64) {
    let keys = Keys::parse(&of("k", &format!("tenant = \"a\", expires = {expires}"))).expect("valid");
    assert_eq!(keys.find("k").expect("listed").expires_unix_s, Some(seconds));
}

proptest! {
    #[test]
    fn a_line_reads_back_as_it_was_meant(key in "[!-~]{1,40}", tenant in "[ -~äß]{0,40}", admin: bool) {
        let (role, tenant) = match admin {
            true => (KeyRole::Admin, String::new()),
            false => (KeyRole::Client, tenant),
        };
        let text = line(&digest(&key), &tenant, role, Some("2030-01-01T00:00:00Z"));
        prop_assert!(!text.contains('\n'));
        let keys = Keys::parse(&text).expect("valid");
        let entry = keys.find(&key).expect("listed");
        prop_assert_eq!((&entry.tenant, entry.role), (&tenant, role));
    }

    #[test]
    fn days_are_counted_as_the_calendar_does(days in 0_u64..60_000) {
        let time = date_after(days);
        let keys = Keys::parse(&of("k", &format!("tenant = \"a\", expires = {time}"))).expect("valid");
        prop_assert_eq!(keys.find("k").expect("listed").expires_unix_s, Some(days * 86_400));
    }
}

/// The naive model: one day after the other.
fn date_after(days: u64) -> String {
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let (mut year, mut rest) = (1970, days);
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}", rest + 1)
}
