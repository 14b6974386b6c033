use super::*;

#[test]
fn the_names_of_settings_are_those_of_policies() {
    for policy in Eviction::ALL {
        assert_eq!(policy.name().parse(), Ok(policy));
        let json = serde_json::to_string(&policy).unwrap();
        assert_eq!(json, format!("\"{policy}\""));
    }
    let error = "clock".parse::<Eviction>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "\"clock\" is no eviction policy: use lru, lfu, s3fifo or returns"
    );
}
