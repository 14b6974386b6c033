//! The GGUF container: typed metadata and the places of tensors.
//!
//! Versions 2 and 3, little-endian, as specified in ggml's `docs/gguf.md`:
//! `"GGUF", version: u32, tensors: u64, pairs: u64`, then the metadata pairs `key: string, type: u32, value`, then
//! the tensor infos `name: string, dimensions: u32, shape: u64[], ggml_type: u32, offset: u64`, then, aligned, the
//! tensors' bytes. A string is `length: u64` and so many bytes.
//!
//! Invariant: nothing is allocated, and nothing is read, on the word of a length or count in the file before that
//! many bytes are known to be there. What the tensors and keys mean is decided elsewhere (`gguf_model.rs`).

use std::{collections::HashMap, ops::Range, sync::Arc};

use super::{LoadError, mapped::MappedFile};
use crate::tensor::TensorFormat;

/// Far above any real model (Llama 3.1 405B has 1138); bounds the memory that a hostile header can ask for.
const TENSORS_MAX: u64 = 1 << 16;
/// Real files have some dozens.
const PAIRS_MAX: u64 = 1 << 16;
/// The specification's limit.
const KEY_BYTES_MAX: usize = (1 << 16) - 1;
/// ggml's limit is 64.
const TENSOR_NAME_BYTES_MAX: usize = 1 << 10;
/// ggml's limit.
const DIMENSIONS_MAX: u32 = 4;
/// No known key nests arrays at all; bounds the recursion.
const ARRAY_DEPTH_MAX: usize = 4;
/// What `general.alignment` is when it is not given.
const ALIGNMENT_DEFAULT: u64 = 32;

/// A value of the metadata. Strings and arrays stay in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Any of the unsigned types.
    Unsigned(u64),
    /// Any of the signed types.
    Signed(i64),
    /// Either of the floating-point types.
    Float(f64),
    Bool(bool),
    /// The bytes of valid UTF-8.
    String(Range<usize>),
    Array(Array),
}

/// A homogeneous array, already checked to lie within the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    element: ValueType,
    pub(super) count: usize,
    bytes: Range<usize>,
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorInfo {
    /// Fastest dimension first, as ggml has it.
    pub(super) dimensions: Vec<u64>,
    pub(super) ggml_type: u32,
    /// Offset of the first byte in the file.
    pub(super) start: u64,
}

/// A parsed header over its file.
#[derive(Debug)]
pub(super) struct Gguf {
    pub(super) file: Arc<MappedFile>,
    metadata: HashMap<String, Value>,
    pub(super) tensors: HashMap<String, TensorInfo>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::String,
            9 => Self::Array,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Size of a scalar; `None` for strings and arrays.
    fn bytes(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

impl Gguf {
    /// Reads the header of `file`.
    pub(super) fn parse(file: Arc<MappedFile>) -> Result<Self, LoadError> {
        let mut reader = Reader { file: &file, at: 0 };
        let (tensor_count, pair_count) = reader.preamble()?;
        let mut metadata = HashMap::new();
        for _ in 0..pair_count {
            let key = reader.string(KEY_BYTES_MAX, "a key")?.to_owned();
            let value = reader.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(file.malformed(format!("the key {key} appears twice")));
            }
        }
        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            infos.push(reader.tensor_info()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => ALIGNMENT_DEFAULT,
            Some(Value::Unsigned(alignment))
                if alignment.is_power_of_two() && (1..=1 << 20).contains(alignment) =>
            {
                *alignment
            }
            Some(other) => {
                return Err(LoadError::BadValue {
                    path: file.path().to_owned(),
                    key: "general.alignment".into(),
                    value: format!("{other:?}"),
                    expected: "a power of two up to 2^20".into(),
                });
            }
        };
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        let mut tensors = HashMap::with_capacity(infos.len());
        for (name, mut info) in infos {
            if !info.start.is_multiple_of(alignment) {
                let detail = format!(
                    "tensor {name} begins at {}, which is not aligned to {alignment}",
                    info.start
                );
                return Err(file.malformed(detail));
            }
            info.start = info
                .start
                .checked_add(data_start)
                .filter(|start| *start <= file.len() as u64)
                .ok_or_else(|| {
                    file.malformed(format!(
                        "tensor {name} begins at {}, beyond the end of the file",
                        info.start
                    ))
                })?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(file.malformed(format!("the tensor {name} appears twice")));
            }
        }
        Ok(Self {
            file,
            metadata,
            tensors,
        })
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// An unsigned number of any width; a signed one that is not negative counts.
    pub(super) fn unsigned(&self, key: &str) -> Result<Option<u64>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) if *value >= 0 => Ok(Some(value.unsigned_abs())),
            Some(other) => Err(self.bad_value(key, other, "an unsigned number")),
        }
    }

    /// An array of truth values.
    pub(super) fn bools(&self, key: &str) -> Result<Option<Vec<bool>>, LoadError> {
        let array = self.array(key, &[ValueType::Bool], "an array of truth values")?;
        let bytes = array.map(|array| self.file.range(&array.bytes));
        Ok(bytes.map(|bytes| bytes.iter().map(|byte| *byte != 0).collect()))
    }

    /// A number.
    pub(super) fn float(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(other) => Err(self.bad_value(key, other, "a finite floating-point number")),
        }
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.bad_value(key, other, "true or false")),
        }
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(range)) => Ok(Some(self.text(range))),
            Some(other) => Err(self.bad_value(key, other, "a string")),
        }
    }

    /// The strings of an array.
    pub(super) fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, LoadError> {
        let Some(array) = self.array(key, &[ValueType::String], "an array of strings")? else {
            return Ok(None);
        };
        let mut reader = Reader {
            file: &self.file,
            at: array.bytes.start,
        };
        let mut strings = Vec::with_capacity(array.count);
        for _ in 0..array.count {
            strings.push(reader.string(usize::MAX, key)?);
        }
        Ok(Some(strings))
    }

    /// The numbers of an array of `i32` or `u32`.
    pub(super) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, LoadError> {
        let wanted = [ValueType::I32, ValueType::U32];
        let Some(array) = self.array(key, &wanted, "an array of 32-bit integers")? else {
            return Ok(None);
        };
        let (words, _) = self.file.range(&array.bytes).as_chunks::<4>();
        let signed = array.element == ValueType::I32;
        let widen = |word: &[u8; 4]| {
            if signed {
                i64::from(i32::from_le_bytes(*word))
            } else {
                i64::from(u32::from_le_bytes(*word))
            }
        };
        Ok(Some(words.iter().map(widen).collect()))
    }

    /// The numbers of an array of `f32`.
    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, LoadError> {
        let Some(array) = self.array(key, &[ValueType::F32], "an array of f32")? else {
            return Ok(None);
        };
        let (words, _) = self.file.range(&array.bytes).as_chunks::<4>();
        Ok(Some(words.iter().map(|word| f32::from_le_bytes(*word)).collect()))
    }

    /// The bytes and the encoding of a tensor, whose shape the caller knows from its info.
    pub(super) fn tensor_bytes(
        &self,
        name: &str,
        info: &TensorInfo,
    ) -> Result<(TensorFormat, &[u8]), LoadError> {
        let format =
            TensorFormat::from_ggml_type(info.ggml_type).ok_or_else(|| LoadError::UnsupportedFormat {
                path: self.file.path().to_owned(),
                tensor: name.to_owned(),
                format: format!("ggml type {}", info.ggml_type),
            })?;
        let elements = info
            .dimensions
            .iter()
            .try_fold(1u64, |product, dimension| product.checked_mul(*dimension));
        let block = format.block_elements() as u64;
        let cols = info.dimensions[0];
        if !cols.is_multiple_of(block) {
            return Err(self.file.malformed(format!(
                "tensor {name} has rows of {cols} elements, which are not whole {} blocks of {block}",
                format.name()
            )));
        }
        let end = elements
            .and_then(|elements| (elements / block).checked_mul(format.block_bytes() as u64))
            .and_then(|bytes| bytes.checked_add(info.start))
            .filter(|end| *end <= self.file.len() as u64)
            .ok_or_else(|| {
                self.file.malformed(format!(
                    "tensor {name} of {:?} {} elements at {} ends beyond the end of the file at {}",
                    info.dimensions,
                    format.name(),
                    info.start,
                    self.file.len()
                ))
            })?;
        Ok((format, self.file.range(&(info.start as usize..end as usize))))
    }

    fn array(&self, key: &str, elements: &[ValueType], expected: &str) -> Result<Option<&Array>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if elements.contains(&array.element) => Ok(Some(array)),
            Some(other) => Err(self.bad_value(key, other, expected)),
        }
    }

    fn text(&self, range: &Range<usize>) -> &str {
        std::str::from_utf8(self.file.range(range)).expect("strings were checked when the header was read")
    }

    pub(super) fn bad_value(&self, key: &str, value: &Value, expected: &str) -> LoadError {
        let value = match value {
            Value::Unsigned(value) => value.to_string(),
            Value::Signed(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::String(range) => format!("{:?}", self.text(range)),
            Value::Array(array) => format!("an array of {} {:?}", array.count, array.element),
        };
        LoadError::BadValue {
            path: self.file.path().to_owned(),
            key: key.to_owned(),
            value,
            expected: expected.to_owned(),
        }
    }
}

/// A cursor that never leaves the file.
struct Reader<'a> {
    file: &'a MappedFile,
    at: usize,
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize, what: &str) -> Result<&'a [u8], LoadError> {
        let end = self
            .at
            .checked_add(count)
            .filter(|end| *end <= self.file.len())
            .ok_or_else(|| {
                self.file.malformed(format!(
                    "{what} of {count} bytes at offset {} ends beyond the end of the file at {}",
                    self.at,
                    self.file.len()
                ))
            })?;
        let bytes = self.file.range(&(self.at..end));
        self.at = end;
        Ok(bytes)
    }

    fn word<const N: usize>(&mut self, what: &str) -> Result<[u8; N], LoadError> {
        let bytes = self.bytes(N, what)?;
        Ok(bytes.try_into().expect("as many bytes as were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, LoadError> {
        self.word(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, LoadError> {
        self.word(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, bytes_max: usize, what: &str) -> Result<&'a str, LoadError> {
        let at = self.at;
        let length = self.u64(what)?;
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= bytes_max)
            .ok_or_else(|| {
                self.file.malformed(format!(
                    "{what} at offset {at} has {length} bytes, more than {bytes_max}"
                ))
            })?;
        let bytes = self.bytes(length, what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            self.file
                .malformed(format!("{what} at offset {at} is not UTF-8: {error}"))
        })
    }

    /// Magic, version and the two counts.
    fn preamble(&mut self) -> Result<(u64, u64), LoadError> {
        let magic: [u8; 4] = self.word("the magic number")?;
        if &magic != b"GGUF" {
            return Err(self.file.malformed(format!(
                "not a GGUF file: it begins with \"{}\" instead of \"GGUF\"",
                magic.escape_ascii()
            )));
        }
        let version = self.u32("the version")?;
        if version.swap_bytes() <= 0xff && version > 0xff {
            return Err(self
                .file
                .malformed("the file is big-endian GGUF, which is not supported"));
        }
        if !(2..=3).contains(&version) {
            return Err(self.file.malformed(format!(
                "GGUF version {version} is not supported, but 2 and 3 are"
            )));
        }
        let tensors = self.u64("the number of tensors")?;
        let pairs = self.u64("the number of metadata pairs")?;
        for (count, limit, what) in [
            (tensors, TENSORS_MAX, "tensors"),
            (pairs, PAIRS_MAX, "metadata pairs"),
        ] {
            if count > limit {
                return Err(self
                    .file
                    .malformed(format!("the header counts {count} {what}, more than {limit}")));
            }
        }
        Ok((tensors, pairs))
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, LoadError> {
        let number = self.u32(key)?;
        ValueType::from_number(number).ok_or_else(|| {
            self.file
                .malformed(format!("{key} has the unknown value type {number}"))
        })
    }

    fn value(&mut self, key: &str) -> Result<Value, LoadError> {
        Ok(match self.value_type(key)? {
            ValueType::U8 => Value::Unsigned(u64::from(u8::from_le_bytes(self.word(key)?))),
            ValueType::U16 => Value::Unsigned(u64::from(u16::from_le_bytes(self.word(key)?))),
            ValueType::U32 => Value::Unsigned(u64::from(self.u32(key)?)),
            ValueType::U64 => Value::Unsigned(self.u64(key)?),
            ValueType::I8 => Value::Signed(i64::from(i8::from_le_bytes(self.word(key)?))),
            ValueType::I16 => Value::Signed(i64::from(i16::from_le_bytes(self.word(key)?))),
            ValueType::I32 => Value::Signed(i64::from(i32::from_le_bytes(self.word(key)?))),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.word(key)?)),
            ValueType::F32 => Value::Float(f64::from(f32::from_le_bytes(self.word(key)?))),
            ValueType::F64 => Value::Float(f64::from_le_bytes(self.word(key)?)),
            ValueType::Bool => match self.word::<1>(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.file.malformed(format!("{key} is the truth value {other}"))),
            },
            ValueType::String => {
                let length = self.string(usize::MAX, key)?.len();
                Value::String(self.at - length..self.at)
            }
            ValueType::Array => Value::Array(self.array(key, 1)?),
        })
    }

    /// Passes over an array, so that it is known to lie within the file.
    fn array(&mut self, key: &str, depth: usize) -> Result<Array, LoadError> {
        if depth > ARRAY_DEPTH_MAX {
            return Err(self
                .file
                .malformed(format!("{key} nests arrays deeper than {ARRAY_DEPTH_MAX}")));
        }
        let element = self.value_type(key)?;
        let count = self.u64(key)?;
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= self.file.len())
            .ok_or_else(|| {
                self.file.malformed(format!(
                    "{key} counts {count} elements, more than the file has bytes"
                ))
            })?;
        let start = self.at;
        match element.bytes() {
            Some(bytes) => {
                self.bytes(count.saturating_mul(bytes), key)?;
            }
            None => {
                for _ in 0..count {
                    if element == ValueType::String {
                        self.string(usize::MAX, key)?;
                    } else {
                        self.array(key, depth + 1)?;
                    }
                }
            }
        }
        Ok(Array {
            element,
            count,
            bytes: start..self.at,
        })
    }

    fn tensor_info(&mut self) -> Result<(String, TensorInfo), LoadError> {
        let name = self.string(TENSOR_NAME_BYTES_MAX, "a tensor's name")?.to_owned();
        let count = self.u32(&name)?;
        if !(1..=DIMENSIONS_MAX).contains(&count) {
            return Err(self
                .file
                .malformed(format!("tensor {name} has {count} dimensions")));
        }
        let mut dimensions = Vec::with_capacity(count as usize);
        for _ in 0..count {
            dimensions.push(self.u64(&name)?);
        }
        if dimensions.contains(&0) {
            return Err(self
                .file
                .malformed(format!("tensor {name} has the empty shape {dimensions:?}")));
        }
        Ok((
            name.clone(),
            TensorInfo {
                dimensions,
                ggml_type: self.u32(&name)?,
                start: self.u64(&name)?,
            },
        ))
    }
}
