//! What the integration tests share.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use engine::{Model, Precision};
use serde_json::Value;

/// A file below the workspace's root.
pub(crate) fn workspace(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// SmolLM2-135M-Instruct, the model that the golden files are about.
pub(crate) fn real_model(precision: Precision) -> Arc<Model> {
    static MODELS: [OnceLock<Arc<Model>>; 2] = [OnceLock::new(), OnceLock::new()];
    let slot = &MODELS[usize::from(precision == Precision::Fast)];
    let path = std::env::var_os("PERIGEE_MODEL").map_or_else(
        || workspace("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    Arc::clone(slot.get_or_init(|| Model::load(&path, precision).expect("the model loads")))
}

/// A prompt of the golden file, and what the reference answers.
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
    pub(crate) margins: Vec<f32>,
    pub(crate) top5: Vec<(usize, f32)>,
}

pub(crate) fn goldens() -> Vec<Golden> {
    let text =
        std::fs::read_to_string(workspace("tests/golden/smollm2_135m_q4_1.json")).expect("golden file");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let integers = |value: &Value| -> Vec<u32> {
        value
            .as_array()
            .expect("array")
            .iter()
            .map(|id| id.as_u64().expect("id") as u32)
            .collect()
    };
    let float = |value: &Value| value.as_f64().expect("number") as f32;
    let prompts = json["prompts"].as_object().expect("prompts").iter();
    prompts
        .map(|(name, prompt)| Golden {
            name: name.clone(),
            ids: integers(&prompt["ids"]),
            greedy: integers(&prompt["greedy"]),
            margins: prompt["margins"]
                .as_array()
                .expect("margins")
                .iter()
                .map(float)
                .collect(),
            top5: prompt["top5"]
                .as_array()
                .expect("top5")
                .iter()
                .map(|pair| (pair[0].as_u64().expect("id") as usize, float(&pair[1])))
                .collect(),
        })
        .collect()
}
