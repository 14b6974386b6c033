//! The processor time of this process.

use std::time::Duration;

/// User and system time of all threads since the start.
pub(crate) fn processor_time() -> Duration {
    // SAFETY: all-zero is a valid `rusage`, a struct of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is valid for writing. The call fails for bad arguments only.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let time = |value: libc::timeval| {
        Duration::new(
            value.tv_sec.unsigned_abs(),
            value.tv_usec.unsigned_abs() as u32 * 1000,
        )
    };
    time(usage.ru_utime) + time(usage.ru_stime)
}
