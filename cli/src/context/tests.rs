use super::*;
use crate::output::golden;

fn contexts() -> Contexts {
    let mut contexts = Contexts {
        current: "prod".into(),
        ..Contexts::default()
    };
    let prod = Context {
        router: "10.0.0.1:50051".into(),
        api_key_file: "/home/me/prod.key".into(),
        model: "tiny".into(),
        tls: file::TlsFiles {
            authority: "/home/me/ca.pem".into(),
            ..file::TlsFiles::default()
        },
    };
    contexts.contexts.insert("prod".into(), prod);
    let lab = Context {
        router: "lab:50051".into(),
        ..Context::default()
    };
    contexts.contexts.insert("lab".into(), lab);
    contexts
}

#[test]
fn contexts_are_listed_and_shown() {
    let contexts = contexts();
    golden::check("context-list", &list_view(&contexts));
    let prod = contexts.get("prod").expect("there");
    golden::check("context-show", &show_view("prod", prod, &contexts));
    golden::check("context-set", &done("prod", "is set"));
}

#[test]
fn a_named_router_is_not_shown_what_is_for_the_current_one() {
    let contexts = contexts();
    let router = |named, router| chosen(&contexts, named, router).map(|context| context.router);
    assert_eq!(
        router(None, None).as_deref(),
        Ok("10.0.0.1:50051"),
        "the current one"
    );
    assert_eq!(router(Some("lab"), None).as_deref(), Ok("lab:50051"));
    assert_eq!(chosen(&contexts, None, Some("other:1")), Ok(Context::default()));
    let both = chosen(&contexts, Some("prod"), Some("other:1")).expect("both are named");
    assert_eq!(both.api_key_file, "/home/me/prod.key");
    assert_eq!(
        router(Some("x"), None).expect_err("unknown").code,
        ErrorCode::NotFound
    );
    let mut stale = contexts;
    stale.current = "gone".into();
    assert!(chosen(&stale, None, None).is_err());
    assert_eq!(chosen(&Contexts::default(), None, None), Ok(Context::default()));
}

#[test]
fn what_is_not_given_stays_and_what_is_empty_goes() {
    let mut contexts = contexts();
    let prod = contexts.contexts.get_mut("prod").expect("there");
    let set = SetArgs {
        api_key_file: Some("key".into()),
        model: Some(String::new()),
        ..SetArgs::default()
    };
    change(prod, &set, None).expect("changed");
    assert_eq!(
        (prod.router.as_str(), prod.model.as_str()),
        ("10.0.0.1:50051", "")
    );
    assert!(
        Path::new(&prod.api_key_file).is_absolute(),
        "{}",
        prod.api_key_file
    );
    let set = SetArgs {
        api_key_file: Some("".into()),
        ..SetArgs::default()
    };
    change(prod, &set, Some("new:1")).expect("changed");
    assert_eq!((prod.router.as_str(), prod.api_key_file.as_str()), ("new:1", ""));
    assert_eq!(prod.tls.authority, "/home/me/ca.pem");
}
