//! The safetensors container: `header_bytes: u64`, a JSON object `name → { dtype, shape, data_offsets }`, the data.
//!
//! Read here rather than through the `safetensors` crate, whose sum over the offsets of a hostile header overflows.

use std::{collections::BTreeMap, ops::Range};

use serde::Deserialize;

use super::LoadError;
use super::mapped::MappedFile;
use crate::tensor::TensorFormat;

/// The format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The one key of the header that is no tensor.
const METADATA_KEY: &str = "__metadata__";

/// A tensor that lies within the file.
#[derive(Debug)]
pub(super) struct Entry {
    /// The encoding as the file names it.
    pub(super) dtype: String,
    /// Slowest dimension first.
    pub(super) shape: Vec<u64>,
    /// From the beginning of the file.
    pub(super) bytes: Range<usize>,
}

impl Entry {
    /// The encoding, if the engine reads it.
    pub(super) fn format(&self) -> Option<TensorFormat> {
        match self.dtype.as_str() {
            "F32" => Some(TensorFormat::F32),
            "F16" => Some(TensorFormat::F16),
            "BF16" => Some(TensorFormat::Bf16),
            "F8_E4M3" => Some(TensorFormat::F8E4M3),
            _ => None,
        }
    }
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Reads the header of `file`.
pub(super) fn parse(file: &MappedFile) -> Result<BTreeMap<String, Entry>, LoadError> {
    let (length, rest) = file
        .split_first_chunk::<8>()
        .ok_or_else(|| file.malformed("the file has no header"))?;
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX || length > rest.len() as u64 {
        return Err(file.malformed(format!(
            "the header has {length} bytes, but the file has {} and {HEADER_BYTES_MAX} are the limit",
            rest.len()
        )));
    }
    let (header, data) = rest.split_at(length as usize);
    let data_start = file.len() - data.len();
    let mut raw: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header)
        .map_err(|error| file.malformed(format!("the header is not a JSON object: {error}")))?;
    raw.remove(METADATA_KEY);
    let mut entries = BTreeMap::new();
    for (name, value) in raw {
        let RawEntry {
            dtype,
            shape,
            data_offsets: [start, end],
        } = serde_json::from_value(value).map_err(|error| {
            file.malformed(format!("tensor {name} is not described as it should be: {error}"))
        })?;
        if start > end || end > data.len() as u64 {
            let detail = format!(
                "tensor {name} lies at {start}..{end}, but there are {} bytes",
                data.len()
            );
            return Err(file.malformed(detail));
        }
        let entry = Entry {
            dtype,
            shape,
            bytes: data_start + start as usize..data_start + end as usize,
        };
        if let Some(format) = entry.format() {
            let elements = entry
                .shape
                .iter()
                .try_fold(1u64, |product, dimension| product.checked_mul(*dimension));
            let bytes = elements.and_then(|elements| elements.checked_mul(format.block_bytes() as u64));
            if bytes != Some(end - start) || bytes == Some(0) {
                return Err(file.malformed(format!(
                    "tensor {name} of {:?} {} elements occupies {} bytes",
                    entry.shape,
                    entry.dtype,
                    end - start
                )));
            }
        }
        entries.insert(name, entry);
    }
    Ok(entries)
}
