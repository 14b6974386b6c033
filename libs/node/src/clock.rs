//! The time of day, as it is told to others.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds from 1970 to `at`; 0 before that, which is as good as none.
pub fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The same in seconds.
pub fn unix_s(at: SystemTime) -> u64 {
    unix_ms(at) / 1000
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_time_before_1970_is_none() {
        let at = UNIX_EPOCH + Duration::from_micros(2_500_900);
        assert_eq!((unix_ms(at), unix_s(at)), (2_500, 2));
        assert_eq!(unix_ms(UNIX_EPOCH - Duration::from_secs(1)), 0);
    }
}
