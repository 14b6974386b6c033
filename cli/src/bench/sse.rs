//! Server-sent events, as far as OpenAI's APIs use them. Pure.

use types::Error;

/// An event larger than this is none of ours.
const EVENT_BYTES_MAX: usize = 4 << 20;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// Its name; empty for most.
    pub(super) name: String,
    pub(super) data: String,
}

/// Events out of bytes that come in any pieces.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// What came after the last complete line.
    rest: Vec<u8>,
    name: String,
    data: Option<String>,
}

impl Reader {
    /// Takes bytes, and gives the events that they complete.
    ///
    /// # Errors
    ///
    /// They are no text, or an event is too large.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, Error> {
        self.rest.extend_from_slice(bytes);
        let mut events = Vec::new();
        let mut begin = 0;
        while let Some(length) = self.rest[begin..].iter().position(|byte| *byte == b'\n') {
            let line = self.rest[begin..begin + length].to_vec();
            begin += length + 1;
            let line = String::from_utf8(line).map_err(|_| Error::internal("an event is not UTF-8"))?;
            events.extend(self.line(line.strip_suffix('\r').unwrap_or(&line)));
        }
        self.rest.drain(..begin);
        let size = self.rest.len() + self.data.as_ref().map_or(0, String::len);
        if size > EVENT_BYTES_MAX {
            let message = format!("an event has {size} bytes, but at most {EVENT_BYTES_MAX} are read");
            return Err(Error::internal(message));
        }
        Ok(events)
    }

    fn line(&mut self, line: &str) -> Option<Event> {
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            return self.data.take().map(|data| Event { name, data });
        }
        // A line without a colon is a field without a value, and one that begins with a colon a comment.
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.name),
            "data" => match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                none => *none = Some(value.to_owned()),
            },
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "data: {\"a\": 1}\r\n\r\n: a comment\nevent: error\ndata:x\ndata: y\nid: 3\n\n\nevent: ping\n\ndata: [DONE]\n\n";

    fn event(name: &str, data: &str) -> Event {
        Event {
            name: name.to_owned(),
            data: data.to_owned(),
        }
    }

    #[test]
    fn events_are_the_same_in_all_pieces() {
        let expected = [
            event("", "{\"a\": 1}"),
            event("error", "x\ny"),
            event("", "[DONE]"),
        ];
        for size in 1..=TEXT.len() {
            let mut reader = Reader::default();
            let pieces = TEXT.as_bytes().chunks(size);
            let events: Vec<Event> = pieces
                .flat_map(|piece| reader.push(piece).expect("text"))
                .collect();
            assert_eq!(events, expected, "in pieces of {size} bytes");
        }
    }

    #[test]
    fn a_character_may_be_split() {
        let mut reader = Reader::default();
        let bytes = "data: é\n\n".as_bytes();
        assert_eq!(reader.push(&bytes[..7]), Ok(vec![]));
        assert_eq!(reader.push(&bytes[7..]), Ok(vec![event("", "é")]));
    }

    #[test]
    fn what_is_no_event_is_refused() {
        assert!(Reader::default().push(b"data: \xff\n").is_err());
        let mut reader = Reader::default();
        let endless = vec![b'x'; EVENT_BYTES_MAX];
        assert!(reader.push(&endless).is_ok());
        let error = reader.push(b"x").expect_err("too large");
        assert!(error.message.contains("4194305 bytes"), "{error}");
    }
}
