//! Why a model cannot be loaded.

use std::{io, path::PathBuf};

use types::ErrorCode;

/// Every variant names the file at fault and the values that were found.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened, read or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// The bytes break the rules of their format: the file is truncated, damaged or of another kind.
    #[error("{}: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which rule, and where.
        detail: String,
    },
    /// The file does not say something that is needed.
    #[error("{}: {key} is missing", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key of the GGUF metadata, or of the JSON object.
        key: String,
    },
    /// A value is outside of what makes sense.
    #[error("{}: {key} is {value}, but must be {expected}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// The key of the GGUF metadata, or of the JSON object.
        key: String,
        /// What was found.
        value: String,
        /// What would do.
        expected: String,
    },
    /// A weight that the architecture needs is not there.
    #[error("{}: tensor {tensor} is missing", path.display())]
    MissingTensor {
        /// The file, or the directory.
        path: PathBuf,
        /// The name in the file.
        tensor: String,
    },
    /// A weight does not fit the configuration.
    #[error("{}: tensor {tensor} is {found:?}, but the configuration makes it {expected:?}", path.display())]
    WrongShape {
        /// The file.
        path: PathBuf,
        /// The name in the file.
        tensor: String,
        /// Rows and columns in the file; one number for a vector.
        found: Vec<u64>,
        /// Rows and columns that the configuration asks for.
        expected: Vec<u64>,
    },
    /// A weight is encoded in a way that the engine cannot read.
    #[error("{}: tensor {tensor} is encoded as {format}, which is not supported", path.display())]
    UnsupportedFormat {
        /// The file.
        path: PathBuf,
        /// The name in the file.
        tensor: String,
        /// The encoding as the file names it.
        format: String,
    },
    /// The model is not of a family that the engine computes.
    #[error("{}: architecture {architecture:?} is not supported; supported are {supported}", path.display())]
    UnsupportedArchitecture {
        /// The file.
        path: PathBuf,
        /// As the file names it.
        architecture: String,
        /// Those that would do.
        supported: String,
    },
    /// The model uses something that would change its results, and that the engine does not compute.
    #[error("{}: {feature} is not supported, and leaving it out would change the model's results", path.display())]
    UnsupportedFeature {
        /// The file.
        path: PathBuf,
        /// The feature with its value.
        feature: String,
    },
    /// The tokenizer is missing, inconsistent or of an unknown kind.
    #[error("{}: tokenizer: {detail}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The chat template is not a valid template.
    #[error("{}: chat template: {detail}", path.display())]
    ChatTemplate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
}

impl LoadError {
    /// What a caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorCode::NotFound,
            Self::Io { .. } => ErrorCode::Unavailable,
            Self::Malformed { .. }
            | Self::MissingKey { .. }
            | Self::MissingTensor { .. }
            | Self::WrongShape { .. } => ErrorCode::Corrupt,
            Self::BadValue { .. }
            | Self::UnsupportedFormat { .. }
            | Self::UnsupportedArchitecture { .. }
            | Self::UnsupportedFeature { .. }
            | Self::Tokenizer { .. }
            | Self::ChatTemplate { .. } => ErrorCode::Invalid,
        }
    }
}

impl From<LoadError> for types::Error {
    fn from(error: LoadError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
