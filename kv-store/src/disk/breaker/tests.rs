use super::*;

const LIMITS: Limits = Limits {
    errors_max: 3,
    stall_max: Duration::from_secs(2),
    rate_min: 16 << 20,
    bypass_min: Duration::from_secs(5),
    bypass_max: Duration::from_secs(60),
};

/// A disk that is used by `lanes` threads at a time and moves so many bytes per second over all of them.
struct Disk {
    breaker: Breaker,
    now: Instant,
    rate: f64,
    lanes: usize,
}

impl Disk {
    fn new(rate: f64) -> Self {
        Self {
            breaker: Breaker::new(LIMITS),
            now: Instant::now(),
            rate,
            lanes: 4,
        }
    }

    /// Moves blocks until something changes or the time is over.
    fn run(&mut self, time: Duration) -> Option<Change> {
        const BLOCK: u64 = 256 << 10;
        let end = self.now + time;
        for _ in 0..self.lanes {
            self.breaker.begin(self.now);
        }
        while self.now < end {
            self.now += Duration::from_secs_f64(BLOCK as f64 / self.rate);
            let change = self.breaker.end(Outcome::Moved(BLOCK), self.now);
            if change.is_some() {
                for _ in 1..self.lanes {
                    self.breaker.end(Outcome::Moved(BLOCK), self.now);
                }
                return change;
            }
            self.breaker.begin(self.now);
        }
        for _ in 0..self.lanes {
            self.breaker.end(Outcome::Moved(BLOCK), self.now);
        }
        None
    }
}

#[test]
fn a_healthy_disk_stays_in_use() {
    let mut disk = Disk::new(500e6);
    assert_eq!(disk.run(Duration::from_secs(10)), None);
    let rate = disk.breaker.rate().expect("it was measured");
    assert!((400e6..600e6).contains(&rate), "{rate}");
    assert!(disk.breaker.allows_reads() && disk.breaker.allows_writes(disk.now));
}

#[test]
fn a_disk_of_5_megabytes_per_second_is_passed_over_within_a_second() {
    let mut disk = Disk::new(5e6);
    let began = disk.now;
    let change = disk.run(Duration::from_secs(10)).expect("it is slow");
    let Change::Bypassed(Reason::Slow { bytes_per_second }, time) = change else {
        panic!("{change:?}");
    };
    assert!(
        (4_000_000..6_000_000).contains(&bytes_per_second),
        "{bytes_per_second}"
    );
    assert_eq!(time, LIMITS.bypass_min);
    assert!(disk.now.duration_since(began) < Duration::from_secs(1));
    assert!(!disk.breaker.allows_reads() && !disk.breaker.allows_writes(disk.now));
}

#[test]
fn a_disk_that_is_seldom_used_is_not_slow() {
    let mut disk = Disk::new(500e6);
    disk.lanes = 1;
    for _ in 0..100 {
        assert_eq!(disk.run(Duration::from_millis(1)), None);
        disk.now += Duration::from_secs(10);
    }
    assert!(disk.breaker.allows_reads());
}

#[test]
fn errors_in_a_row_open_it_and_single_ones_do_not() {
    let now = Instant::now();
    let mut breaker = Breaker::new(LIMITS);
    let mut end = |outcome| {
        breaker.begin(now);
        breaker.end(outcome, now)
    };
    for _ in 0..10 {
        assert_eq!(end(Outcome::Failed), None);
        assert_eq!(end(Outcome::Failed), None);
        assert_eq!(end(Outcome::Moved(1)), None);
    }
    assert_eq!(end(Outcome::Failed), None);
    assert_eq!(end(Outcome::Failed), None);
    assert_eq!(
        end(Outcome::Failed),
        Some(Change::Bypassed(Reason::Errors, LIMITS.bypass_min))
    );
    assert_eq!(end(Outcome::Failed), None, "one line per change");
}

#[test]
fn silence_opens_it() {
    let start = Instant::now();
    let mut breaker = Breaker::new(LIMITS);
    breaker.begin(start);
    breaker.begin(start + Duration::from_secs(1));
    assert_eq!(breaker.check(start + LIMITS.stall_max), None);
    let late = start + LIMITS.stall_max + Duration::from_millis(1);
    assert_eq!(
        breaker.check(late),
        Some(Change::Bypassed(Reason::Stalled, LIMITS.bypass_min))
    );
    assert_eq!(breaker.check(late), None);
    let much_later = late + LIMITS.bypass_max;
    assert!(!breaker.begin_probe(much_later), "it is still silent");
    breaker.end(Outcome::Moved(1), much_later);
    breaker.end(Outcome::Moved(1), much_later);
    assert!(breaker.begin_probe(much_later));
}

#[test]
fn probes_come_ever_later_until_one_succeeds() {
    let mut now = Instant::now();
    let mut breaker = Breaker::new(LIMITS);
    for _ in 0..LIMITS.errors_max {
        breaker.begin(now);
        breaker.end(Outcome::Failed, now);
    }
    let mut bypass = LIMITS.bypass_min;
    for _ in 0..6 {
        assert!(!breaker.begin_probe(now + bypass - Duration::from_millis(1)));
        now += bypass;
        assert!(breaker.begin_probe(now));
        assert!(!breaker.begin_probe(now), "one probe at a time");
        bypass = (bypass * 2).min(LIMITS.bypass_max);
        assert_eq!(
            breaker.probed(None, Duration::ZERO, now),
            Change::Bypassed(Reason::Errors, bypass)
        );
    }
    now += bypass;
    assert!(breaker.begin_probe(now));
    let slow = breaker.probed(Some(1 << 20), Duration::from_secs(1), now);
    assert!(
        matches!(slow, Change::Bypassed(Reason::Slow { .. }, _)),
        "{slow:?}"
    );
    now += bypass;
    assert!(breaker.begin_probe(now));
    let well = breaker.probed(Some(1 << 20), Duration::from_millis(10), now);
    assert_eq!(well, Change::Restored);
    assert!(breaker.allows_reads() && breaker.allows_writes(now));
    assert!(!breaker.begin_probe(now + LIMITS.bypass_max));
}

#[test]
fn a_full_disk_is_read_and_not_written() {
    let now = Instant::now();
    let mut breaker = Breaker::new(LIMITS);
    let mut full = |at| {
        breaker.begin(at);
        breaker.end(Outcome::Full, at)
    };
    assert_eq!(full(now), Some(Change::WritesHeld(LIMITS.bypass_max)));
    assert_eq!(full(now), None, "one line per change");
    assert!(breaker.allows_reads() && !breaker.allows_writes(now));
    assert!(breaker.allows_writes(now + LIMITS.bypass_max));
}
