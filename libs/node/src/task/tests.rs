use rstest::rstest;

use super::*;

#[tokio::test]
async fn the_end_of_a_task_that_must_not_end_is_the_end_of_the_process() {
    let shutdown = Shutdown::new();
    let end = async { Ok::<(), Error>(()) };
    spawn("engine", OnEnd::FailProcess(shutdown.clone()), end)
        .await
        .expect("joins");
    assert!(shutdown.is_started());
    let failure = shutdown.failure().expect("a reason");
    assert_eq!(failure.message, "task engine: ended before its time");
}

#[tokio::test]
async fn a_panic_and_an_error_are_reasons_and_the_first_one_counts() {
    let shutdown = Shutdown::new();
    let policy = OnEnd::FailProcess(shutdown.clone());
    let panics = async {
        if true {
            panic!("block 7 is held twice")
        } else {
            Ok::<(), Error>(())
        }
    };
    spawn("store", policy.clone(), panics)
        .await
        .expect("the panic is caught");
    let fails = async { Err(Error::unavailable("gone")) };
    spawn("engine", policy, fails).await.expect("joins");
    let failure = shutdown.failure().expect("a reason");
    assert_eq!(failure.message, "task store: panicked: block 7 is held twice");
}

#[tokio::test]
async fn the_end_of_a_task_at_shutdown_is_no_failure() {
    let shutdown = Shutdown::new();
    let waits = shutdown.clone();
    let waits = async move {
        waits.started().await;
        Ok::<(), Error>(())
    };
    let task = spawn("engine", OnEnd::FailProcess(shutdown.clone()), waits);
    shutdown.start();
    task.await.expect("joins");
    assert_eq!(shutdown.failure(), None);
}

#[rstest]
#[case::told_and_well(true, Ok(()), false)]
#[case::told_and_ill(true, Err(Error::unavailable("broken")), true)]
#[case::not_told(false, Ok(()), true)]
#[tokio::test]
async fn a_task_that_is_told_to_end_may_end_well(
    #[case] told: bool,
    #[case] end: Result<(), Error>,
    #[case] fails: bool,
) {
    let (shutdown, token) = (Shutdown::new(), CancellationToken::new());
    if told {
        token.cancel();
    }
    let policy = OnEnd::FailProcessUnless(shutdown.clone(), token);
    spawn("engine", policy, async { end }).await.expect("joins");
    assert_eq!(shutdown.failure().is_some(), fails);
}

#[tokio::test]
async fn a_task_that_may_end_takes_nothing_with_it() {
    let fails = async { Err(Error::unavailable("gone")) };
    spawn("watch", OnEnd::Log, fails).await.expect("joins");
}

#[tokio::test]
async fn blocking_work_runs_on_a_thread_of_its_name() {
    let name = || std::thread::current().name().map(str::to_owned);
    assert_eq!(
        blocking("load-model", name).await,
        Ok(Some("load-model".to_owned()))
    );
    let panics = blocking("load-model", || panic!("no such file")).await;
    assert_eq!(
        panics,
        Err::<(), _>(Error::internal("thread load-model panicked"))
    );
}
