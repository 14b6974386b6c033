//! The trace that a request belongs to, as W3C Trace Context writes it.

use std::fmt;

/// What a caller says of the trace that its call is a part of: the header `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// Names the trace; never 0.
    pub trace: u128,
    /// The caller's span; never 0.
    pub span: u64,
    /// Whether the trace is recorded.
    pub sampled: bool,
}

/// The bit of the flags that says that the trace is recorded.
const SAMPLED: u8 = 1;

impl TraceParent {
    /// The name of the header.
    pub const HEADER: &str = "traceparent";

    /// Reads `00-<32 digits>-<16 digits>-<2 digits>`, hexadecimal and in small letters. Later versions may say more after that.
    /// `None` for what the specification tells to ignore.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(5, '-');
        let version = hex(parts.next()?, 2)?;
        let trace = hex(parts.next()?, 32)?;
        let span = u64::try_from(hex(parts.next()?, 16)?).ok()?;
        let flags = hex(parts.next()?, 2)? as u8;
        let more = parts.next().is_some();
        if version == 0xff || (version == 0 && more) || trace == 0 || span == 0 {
            return None;
        }
        Some(Self {
            trace,
            span,
            sampled: flags & SAMPLED != 0,
        })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flags = if self.sampled { SAMPLED } else { 0 };
        write!(f, "00-{:032x}-{:016x}-{flags:02x}", self.trace, self.span)
    }
}

fn hex(text: &str, digits: usize) -> Option<u128> {
    let small = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    (text.len() == digits && text.bytes().all(small)).then_some(())?;
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_read_as_it_is_shown() {
        for text in [
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00",
        ] {
            let parent = TraceParent::parse(text).expect("it can be read");
            assert_eq!(parent.to_string(), text);
            assert_eq!(parent.sampled, text.ends_with('1'));
        }
    }

    #[test]
    fn what_the_specification_ignores_is_ignored() {
        for text in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceParent::parse(text), None, "{text}");
        }
        let later = "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more";
        assert!(TraceParent::parse(later).is_some());
    }
}
