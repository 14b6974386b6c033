use futures::FutureExt;

use super::*;

#[tokio::test]
async fn waits_for_what_began_before_and_for_nothing_else() {
    let barrier = Arc::new(Barrier::default());
    let (first, second) = (barrier.begin(), barrier.begin());
    let mark = barrier.mark();
    let _later = barrier.begin();
    let mut passed = Box::pin(barrier.passed(mark));
    assert!(passed.as_mut().now_or_never().is_none());
    drop(second);
    assert!(passed.as_mut().now_or_never().is_none());
    drop(first);
    passed.await;
}
