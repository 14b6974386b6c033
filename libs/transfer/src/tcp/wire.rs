//! Request and answer heads as bytes. Pure; the parent module holds the specification.

use crate::region::Direction;

/// Slices of one request.
pub(crate) const SLICES_MAX: usize = 4096;
/// Payload of one request.
pub(crate) const PAYLOAD_BYTES_MAX: u64 = 1 << 26;
pub(crate) const REQUEST_HEAD_BYTES: usize = 48;
pub(crate) const ANSWER_HEAD_BYTES: usize = 32;
pub(crate) const TABLE_ENTRY_BYTES: usize = 16;
/// What follows the table, and what an answer says beside payload.
pub(crate) const EXTRA_BYTES_MAX: usize = 64 << 10;

const MAGIC: [u8; 4] = *b"PGXF";
const VERSION: u8 = 1;

/// What bytes that are not the protocol are instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("not the transfer protocol: the first bytes are {0:02x?}")]
    Magic([u8; 4]),
    #[error("version {0}, but only {VERSION} is spoken here")]
    Version(u8),
    #[error("unknown operation or status {0}")]
    Kind(u8),
    #[error("reserved bytes are not zero")]
    Reserved,
    #[error("{0} slices, more than {SLICES_MAX} or not those of the operation")]
    Slices(u32),
    #[error("{0} payload bytes, more than {PAYLOAD_BYTES_MAX} or not those of the operation")]
    Payload(u64),
    #[error("an empty slice, or slices that do not add up to the payload")]
    Table,
    #[error("{0} extra bytes, more than {EXTRA_BYTES_MAX} or not those of the operation")]
    Extra(u32),
    #[error("a message that cannot be read")]
    Message,
}

/// What a request asks for, as its sender sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Put the payload that follows into your memory.
    Write,
    /// Send me bytes of your memory.
    Read,
    /// This is where UCX finds me; say where it finds you.
    Introduce,
    /// Put bytes of my memory into yours, through UCX.
    Fetch,
    /// Let me read bytes of your memory, through UCX.
    Admit,
    /// Answer this; bytes come with it or with the answer.
    Call,
}

impl Operation {
    const ALL: [Self; 6] = [
        Self::Write,
        Self::Read,
        Self::Introduce,
        Self::Fetch,
        Self::Admit,
        Self::Call,
    ];

    fn number(self) -> u8 {
        match self {
            Self::Write => 1,
            Self::Read => 2,
            Self::Introduce => 3,
            Self::Fetch => 4,
            Self::Admit => 5,
            Self::Call => 6,
        }
    }

    /// Whether it names slices of memory.
    fn has_slices(self) -> bool {
        match self {
            Self::Write | Self::Read | Self::Fetch | Self::Admit => true,
            Self::Introduce | Self::Call => false,
        }
    }

    /// Whether it may say so many bytes of payload.
    fn allows(self, payload_bytes: u64) -> bool {
        match self {
            Self::Introduce => payload_bytes == 0,
            Self::Call => payload_bytes <= PAYLOAD_BYTES_MAX,
            Self::Write | Self::Read | Self::Fetch | Self::Admit => {
                (1..=PAYLOAD_BYTES_MAX).contains(&payload_bytes)
            }
        }
    }

    /// Whether something follows the table.
    fn has_extra(self) -> bool {
        match self {
            Self::Write | Self::Read => false,
            Self::Introduce | Self::Fetch | Self::Admit | Self::Call => true,
        }
    }

    pub(crate) fn direction(self) -> Direction {
        match self {
            Self::Write | Self::Fetch => Direction::Write,
            // An introduction touches no memory, and a call none that is granted.
            Self::Read | Self::Admit | Self::Introduce | Self::Call => Direction::Read,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestHead {
    pub(crate) operation: Operation,
    pub(crate) id: u64,
    pub(crate) epoch: u64,
    pub(crate) key: u64,
    pub(crate) payload_bytes: u64,
    pub(crate) slices: u32,
    pub(crate) extra_bytes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// What was asked for is done.
    Done,
    UnknownKey,
    Denied,
    StaleEpoch {
        current: u64,
    },
    OutOfRange {
        slice: u64,
    },
    /// There is no such link, or it broke: introduce yourself again.
    NoLink,
    /// UCX could not do it, and no byte of it is on its way.
    NotMoved,
    /// Nobody answers calls here.
    Unserved,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AnswerHead {
    pub(crate) status: Status,
    pub(crate) id: u64,
    /// Bytes that follow.
    pub(crate) payload_bytes: u64,
    /// Of a call that is done: how many of them, from the first one on, are its message.
    pub(crate) message_bytes: u64,
}

impl RequestHead {
    /// The head, and what belongs behind it: the table, and `extra`.
    pub(crate) fn encode(&self, table: impl IntoIterator<Item = (u64, u64)>, extra: &[u8]) -> Vec<u8> {
        let behind = self.table_bytes() + extra.len();
        let mut bytes = Vec::with_capacity(REQUEST_HEAD_BYTES + behind);
        bytes.extend(MAGIC);
        bytes.push(VERSION);
        bytes.push(self.operation.number());
        bytes.extend([0; 2]);
        bytes.extend(self.id.to_le_bytes());
        bytes.extend(self.epoch.to_le_bytes());
        bytes.extend(self.key.to_le_bytes());
        bytes.extend(self.payload_bytes.to_le_bytes());
        bytes.extend(self.slices.to_le_bytes());
        bytes.extend(self.extra_bytes.to_le_bytes());
        for (offset, len) in table {
            bytes.extend(offset.to_le_bytes());
            bytes.extend(len.to_le_bytes());
        }
        bytes.extend(extra);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; REQUEST_HEAD_BYTES]) -> Result<Self, WireError> {
        let kind = prelude(bytes)?;
        let operation = Operation::ALL.into_iter().find(|known| known.number() == kind);
        let operation = operation.ok_or(WireError::Kind(kind))?;
        let head = Self {
            operation,
            id: u64_at(bytes, 8),
            epoch: u64_at(bytes, 16),
            key: u64_at(bytes, 24),
            payload_bytes: u64_at(bytes, 32),
            slices: u64_at(bytes, 40) as u32,
            extra_bytes: (u64_at(bytes, 40) >> 32) as u32,
        };
        if (head.slices != 0) != operation.has_slices() || head.slices as usize > SLICES_MAX {
            return Err(WireError::Slices(head.slices));
        }
        if !operation.allows(head.payload_bytes) {
            return Err(WireError::Payload(head.payload_bytes));
        }
        if (head.extra_bytes != 0) != operation.has_extra() || head.extra_bytes as usize > EXTRA_BYTES_MAX {
            return Err(WireError::Extra(head.extra_bytes));
        }
        Ok(head)
    }

    pub(crate) fn table_bytes(&self) -> usize {
        self.slices as usize * TABLE_ENTRY_BYTES
    }

    /// The slice table as offsets and lengths.
    pub(crate) fn decode_table(&self, bytes: &[u8]) -> Result<Vec<(u64, u64)>, WireError> {
        if !self.operation.has_slices() {
            return Ok(Vec::new());
        }
        let mut sum = 0_u64;
        let (entries, _) = bytes.as_chunks::<TABLE_ENTRY_BYTES>();
        let slices = entries.iter().map(|entry| {
            let (offset, len) = (u64_at(entry, 0), u64_at(entry, 8));
            sum = sum.checked_add(len).ok_or(WireError::Table)?;
            if len == 0 {
                Err(WireError::Table)
            } else {
                Ok((offset, len))
            }
        });
        let slices = slices.collect::<Result<Vec<_>, _>>()?;
        if sum != self.payload_bytes || slices.len() != self.slices as usize {
            return Err(WireError::Table);
        }
        Ok(slices)
    }
}

impl AnswerHead {
    pub(crate) fn encode(&self) -> [u8; ANSWER_HEAD_BYTES] {
        let (kind, detail) = match self.status {
            Status::Done => (0, self.message_bytes),
            Status::UnknownKey => (1, 0),
            Status::Denied => (2, 0),
            Status::StaleEpoch { current } => (3, current),
            Status::OutOfRange { slice } => (4, slice),
            Status::NoLink => (5, 0),
            Status::NotMoved => (6, 0),
            Status::Unserved => (7, 0),
        };
        let mut bytes = [0; ANSWER_HEAD_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = kind;
        bytes[8..16].copy_from_slice(&self.id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[24..].copy_from_slice(&detail.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; ANSWER_HEAD_BYTES]) -> Result<Self, WireError> {
        let detail = u64_at(bytes, 24);
        let status = match prelude(bytes)? {
            0 => Status::Done,
            1 => Status::UnknownKey,
            2 => Status::Denied,
            3 => Status::StaleEpoch { current: detail },
            4 => Status::OutOfRange { slice: detail },
            5 => Status::NoLink,
            6 => Status::NotMoved,
            7 => Status::Unserved,
            other => return Err(WireError::Kind(other)),
        };
        Ok(Self {
            status,
            id: u64_at(bytes, 8),
            payload_bytes: u64_at(bytes, 16),
            message_bytes: if status == Status::Done { detail } else { 0 },
        })
    }
}

/// Checks the first eight bytes of a head, which is longer, and returns the sixth.
fn prelude(bytes: &[u8]) -> Result<u8, WireError> {
    let magic: [u8; 4] = bytes[..4].try_into().expect("four bytes");
    if magic != MAGIC {
        return Err(WireError::Magic(magic));
    }
    if bytes[4] != VERSION {
        return Err(WireError::Version(bytes[4]));
    }
    if bytes[6..8] != [0, 0] {
        return Err(WireError::Reserved);
    }
    Ok(bytes[5])
}

/// The integer at `offset`, which the caller knows to be inside.
fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let bytes = bytes[offset..offset + 8].try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

#[cfg(test)]
mod tests;
