//! What the kernel says is mapped into this process.

use std::fs;

/// Whether all `bytes` bytes from `start` on are mapped and readable. False where the kernel does not say.
pub(super) fn covers(start: usize, bytes: u64) -> bool {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else {
        return false;
    };
    (start as u64)
        .checked_add(bytes)
        .is_some_and(|end| covered(&maps, start as u64, end))
}

/// `maps` is in the form of `proc_pid_maps(5)`, in ascending order.
fn covered(maps: &str, start: u64, end: u64) -> bool {
    let mut reached = start;
    for line in maps.lines() {
        if reached >= end {
            break;
        }
        let Some((from, to, readable)) = parse(line) else {
            return false;
        };
        if readable && from <= reached && reached < to {
            reached = to;
        }
    }
    reached >= end
}

fn parse(line: &str) -> Option<(u64, u64, bool)> {
    let mut words = line.split_ascii_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let readable = words.next()?.starts_with('r');
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(from)?, number(to)?, readable))
}

#[cfg(test)]
mod tests;
