use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::time::Instant;

use super::*;

/// Longer than anything here takes; a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

async fn until(reached: impl Fn() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < PATIENCE, "not reached within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn what_changes_is_applied_and_what_is_refused_is_not() {
    let folder = TempDir::new().expect("a folder");
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    fs::write(&first, "1").expect("written");
    fs::write(&second, "2").expect("written");
    let paths = vec![first.clone(), second.clone()];
    let known = read(&paths).expect("readable");
    assert_eq!(known, [b"1".to_vec(), b"2".to_vec()]);

    let applied = Arc::new(Mutex::new(Vec::new()));
    let refused = Arc::new(AtomicUsize::new(0));
    let end = CancellationToken::new();
    let (seen, refusals) = (Arc::clone(&applied), Arc::clone(&refused));
    let following = tokio::spawn(follow("test", paths, known, end.clone(), move |contents| {
        if contents[0] == b"bad" {
            refusals.fetch_add(1, Ordering::SeqCst);
            return Err(Error::invalid("first", "bad"));
        }
        seen.lock().expect("not poisoned").push(contents.clone());
        Ok(())
    }));
    fs::write(&first, "bad").expect("written");
    // It is tried again and again: the rest of what belongs together may come yet.
    until(|| refused.load(Ordering::SeqCst) >= 2).await;
    assert!(applied.lock().expect("not poisoned").is_empty());
    fs::write(&second, "3").expect("written");
    fs::write(&first, "4").expect("written");
    let wanted = vec![b"4".to_vec(), b"3".to_vec()];
    until(|| applied.lock().expect("not poisoned").last() == Some(&wanted)).await;
    end.cancel();
    following.await.expect("ends").expect("well");
}

#[test]
fn a_file_that_is_not_there_or_too_large_is_named() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("large");
    let error = read(std::slice::from_ref(&path)).expect_err("missing");
    assert_eq!(error.code, ErrorCode::NotFound);
    fs::write(&path, vec![b' '; FILE_BYTES_MAX as usize + 1]).expect("written");
    let error = read(std::slice::from_ref(&path)).expect_err("too large");
    assert_eq!(error.code, ErrorCode::Invalid);
    assert!(error.message.contains("large"), "{error}");
}
