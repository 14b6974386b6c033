use super::*;

fn tls(settings: &[(String, String)]) -> Option<&str> {
    let named = settings.iter().find(|(name, _)| name == "TLS");
    named.map(|(_, tls)| tls.as_str())
}

#[test]
fn what_the_operator_says_of_transports_decides_both_domains() {
    for (setting, environment, forced, shared, network) in [
        (None, None, false, true, Some("^tcp")),
        (None, None, true, true, None),
        (None, Some("rc,tcp"), false, false, None),
        (None, Some("all"), false, true, None),
        (Some("rc"), Some("all"), false, false, Some("rc")),
        (Some("tcp,self"), None, true, false, Some("tcp,self")),
        (Some("rc,sm"), None, false, true, Some("rc,sm")),
        (Some("^sysv,posix"), None, false, false, Some("^sysv,posix")),
        (Some("^tcp"), None, false, true, Some("^tcp")),
    ] {
        let mut settings = vec![("NET_DEVICES".to_owned(), "eth0".to_owned())];
        settings.extend(setting.map(|tls| ("TLS".to_owned(), tls.to_owned())));
        let (of_shared, of_network) = domain_settings(&settings, environment, forced);
        let case = format!("{setting:?} {environment:?} {forced}");
        assert_eq!(
            of_shared.as_deref().and_then(tls),
            shared.then_some(SHARED_TLS),
            "{case}"
        );
        assert_eq!(tls(&of_network), network, "{case}");
        assert!(of_network.contains(&settings[0]), "{case}");
    }
}
