//! Weights as they lie in a model file.

/// Encoding of a weight tensor. Quantised formats are ggml's; blocks run along the columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The names are the specification's.
pub enum TensorFormat {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
    /// 8 bits of floating point: sign, 4 of exponent, 3 of mantissa, no infinities. Only safetensors hold it, with scales in a
    /// tensor of their own.
    F8E4M3,
}

impl TensorFormat {
    /// All formats that GGUF has, in the order of their definition.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Elements that share one block, and so the smallest width of a row.
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4M3 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::F8E4M3 => 1,
        }
    }

    /// Bytes of a row of `cols` elements, which must be whole blocks.
    pub fn row_bytes(self, cols: usize) -> usize {
        debug_assert_eq!(cols % self.block_elements(), 0);
        cols / self.block_elements() * self.block_bytes()
    }

    /// The name that ggml and its tools use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::F8E4M3 => "F8_E4M3",
        }
    }

    /// The number that stands for the format in a GGUF file (`enum ggml_type`), if there is one.
    pub fn ggml_type(self) -> Option<u32> {
        let number = match self {
            Self::F8E4M3 => return None,
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        };
        Some(number)
    }

    /// Reads what [`TensorFormat::ggml_type`] gives; `None` for formats that the engine does not know.
    pub fn from_ggml_type(number: u32) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|format| format.ggml_type() == Some(number))
    }
}

/// A matrix `[rows, cols]`, row-major: `rows` outputs, `cols` inputs. A vector has one row.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Encoding of `bytes`.
    pub format: TensorFormat,
    /// Outputs.
    pub rows: usize,
    /// Inputs; a multiple of the format's block.
    pub cols: usize,
    /// `rows * format.row_bytes(cols)` bytes.
    pub bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// The bytes of one row.
    ///
    /// # Panics
    ///
    /// When `row` is not below `rows`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let row_bytes = self.format.row_bytes(self.cols);
        &self.bytes[row * row_bytes..(row + 1) * row_bytes]
    }

    /// Decodes the whole tensor, row after row.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_exact_mut(self.cols).enumerate() {
            crate::dequantise::dequantise_row(self.format, self.row(row), out);
        }
        out
    }
}
