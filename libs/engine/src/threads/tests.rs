use std::sync::atomic::AtomicU32;

use rstest::rstest;

use super::*;

fn pool(threads: usize) -> Threads {
    Threads::start(NonZeroUsize::new(threads).expect("not zero")).expect("threads")
}

#[rstest]
#[case(1)]
#[case(2)]
#[case(3)]
#[case(9)]
fn every_item_runs_once(#[case] threads: usize) {
    let mut pool = pool(threads);
    for items in [0, 1, 2, 3, 64, 1000] {
        let counts: Vec<AtomicU32> = (0..items).map(|_| AtomicU32::new(0)).collect();
        let job = |_, item: usize| {
            counts[item].fetch_add(1, SeqCst);
        };
        pool.run(items, &job).expect("no panic");
        assert!(
            counts.iter().all(|count| count.load(SeqCst) == 1),
            "{items} items"
        );
    }
}

#[test]
fn a_worker_runs_one_item_at_a_time() {
    let mut pool = pool(4);
    let busy: Vec<AtomicBool> = (0..pool.count()).map(|_| AtomicBool::new(false)).collect();
    let job = |worker: usize, _| {
        assert!(
            !busy[worker].swap(true, SeqCst),
            "worker {worker} is in two items"
        );
        for _ in 0..100 {
            hint::spin_loop();
        }
        busy[worker].store(false, SeqCst);
    };
    for _ in 0..200 {
        pool.run(32, &job).expect("no panic");
    }
}

#[test]
fn borrowed_results_are_complete_when_run_returns() {
    let mut pool = pool(3);
    for round in 0..5000u32 {
        let sums: Vec<AtomicU32> = (0..5).map(|_| AtomicU32::new(0)).collect();
        pool.run(5, &|_, item| sums[item].store(round + item as u32, SeqCst))
            .expect("no panic");
        for (item, sum) in sums.iter().enumerate() {
            assert_eq!(sum.load(SeqCst), round + item as u32);
        }
    }
}

#[test]
fn workers_that_sleep_are_woken() {
    let mut pool = pool(2);
    let deadline = Instant::now() + Duration::from_secs(20);
    for _ in 0..20 {
        while pool.shared.sleepers.load(SeqCst) == 0 {
            assert!(Instant::now() < deadline, "the worker never sleeps");
            thread::yield_now();
        }
        // Both items wait for each other, so they end only if the worker wakes.
        let here = AtomicU32::new(0);
        let job = |_, _| {
            here.fetch_add(1, SeqCst);
            while here.load(SeqCst) < 2 {
                assert!(Instant::now() < deadline, "the worker did not wake");
                thread::yield_now();
            }
        };
        pool.run(2, &job).expect("no panic");
    }
}

#[rstest]
#[case(1)]
#[case(3)]
fn a_panic_becomes_an_error_and_the_pool_lives(#[case] threads: usize) {
    let mut pool = pool(threads);
    for _ in 0..10 {
        let failed = pool.run(8, &|_, item| assert!(item != 5, "item five"));
        assert_eq!(failed, Err(JobPanicked("item five".into())));
        assert_eq!(pool.run(8, &|_, _| {}), Ok(()));
    }
}

#[test]
fn workers_end_with_the_pool() {
    let pool = pool(4);
    let state = Arc::downgrade(&pool.shared);
    drop(pool);
    assert!(state.upgrade().is_none(), "a worker still holds the state");
}
