//! A model directory as Hugging Face's `save_pretrained` writes it.
//!
//! `config.json` and safetensors shards are required; `generation_config.json`, `tokenizer_config.json` and
//! `chat_template.jinja` are read when they are there. Keys and defaults are those of `transformers`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value};

use super::{
    LoadError,
    hugging_face_rope::rope,
    limits::{self, Dimensions},
    mapped::MappedFile,
    safetensors,
    shapes::Found,
};
use crate::config::ModelConfig;

/// Mixture models of a trillion parameters have some hundred.
const SHARDS_MAX: usize = 1024;
/// `transformers`' default of `rms_norm_eps`.
const NORM_EPSILON_DEFAULT: f64 = 1e-6;
/// What `LlamaForCausalLM` and `MistralForCausalLM` can be told that would change the computation, with the values that do not.
const NEUTRAL: [(&str, &[&str]); 3] = [
    ("hidden_act", &["\"silu\"", "\"swish\""]),
    ("quantization_config", &["null"]),
    ("partial_rotary_factor", &["1", "1.0", "null"]),
];

/// The parsed JSON files and the mapped shards.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    config: Object,
    generation: Option<Object>,
    tokenizer_config: Option<Object>,
    shards: Vec<Arc<MappedFile>>,
    /// Every file that determines results, sorted by name, for the digest.
    pub(super) files: BTreeMap<String, Arc<MappedFile>>,
}

/// A JSON object and where it came from.
#[derive(Debug)]
pub(super) struct Object {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Directory {
    /// Reads the small files and maps the large ones.
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let mut files = BTreeMap::new();
        let mut object = |name: &str| -> Result<Option<Object>, LoadError> {
            let Some(file) = optional(path, name)? else {
                return Ok(None);
            };
            let object = Object::parse(&file)?;
            files.insert(name.to_owned(), file);
            Ok(Some(object))
        };
        let config = object("config.json")?.ok_or_else(|| LoadError::Malformed {
            path: path.to_owned(),
            detail: "the directory has no config.json, so it is no Hugging Face model".into(),
        })?;
        let generation = object("generation_config.json")?;
        let tokenizer_config = object("tokenizer_config.json")?;
        for name in ["tokenizer.json", "chat_template.jinja"] {
            if let Some(file) = optional(path, name)? {
                files.insert(name.to_owned(), file);
            }
        }
        let mut shards = Vec::new();
        for name in shard_names(path)? {
            let file = Arc::new(MappedFile::open(&path.join(&name))?);
            shards.push(Arc::clone(&file));
            files.insert(name, file);
        }
        Ok(Self {
            path: path.to_owned(),
            config,
            generation,
            tokenizer_config,
            shards,
            files,
        })
    }

    /// Reads the configuration.
    pub(super) fn config(&self) -> Result<ModelConfig, LoadError> {
        let config = &self.config;
        let architecture = self.architecture()?;
        for (key, neutral) in NEUTRAL {
            if let Some(value) = config.map.get(key)
                && !neutral.contains(&value.to_string().as_str())
            {
                return Err(config.unsupported(format!("{key} = {value}")));
            }
        }
        let heads = config.size("num_attention_heads")?;
        let hidden = config.size("hidden_size")?;
        let head_dim = match config.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => limits::head_dim(&config.path, hidden, heads)?,
        };
        let dimensions = Dimensions {
            layers: config.size("num_hidden_layers")?,
            hidden,
            intermediate: config.size("intermediate_size")?,
            heads,
            kv_heads: config.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocabulary: config.size("vocab_size")?,
            context_tokens_max: config.size("max_position_embeddings")?,
            rope_dims: head_dim,
        };
        dimensions.check(&config.path)?;
        self.refuse_sliding_windows(dimensions.context_tokens_max)?;
        let (rope, context_tokens_max) = rope(config, &dimensions)?;
        Ok(ModelConfig {
            architecture: architecture.to_owned(),
            name: self
                .path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            layers: dimensions.layers,
            hidden,
            intermediate: dimensions.intermediate,
            heads,
            kv_heads: dimensions.kv_heads,
            head_dim,
            vocabulary: dimensions.vocabulary,
            norm_epsilon: config.positive("rms_norm_eps")?.unwrap_or(NORM_EPSILON_DEFAULT) as f32,
            rope,
            context_tokens_max,
            tied_head: config.bool("tie_word_embeddings")?.unwrap_or(false),
            eos_tokens: self.eos_tokens(dimensions.vocabulary)?,
        })
    }

    /// The tensors by canonical name. Those that are only a copy of something else are left out.
    pub(super) fn tensors(&self, model: &ModelConfig) -> Result<HashMap<String, Found>, LoadError> {
        let mut found = HashMap::new();
        for shard in &self.shards {
            for (native, entry) in safetensors::parse(shard)? {
                let canonical = canonical_name(&native);
                let copy = native.ends_with(".rotary_emb.inv_freq")
                    || (model.tied_head && canonical.as_deref() == Some("output.weight"));
                if copy {
                    continue;
                }
                let format = entry.format().ok_or_else(|| LoadError::UnsupportedFormat {
                    path: shard.path().to_owned(),
                    tensor: native.clone(),
                    format: entry.dtype.clone(),
                })?;
                let tensor = Found {
                    native: native.clone(),
                    shape: entry.shape,
                    format,
                    file: Arc::clone(shard),
                    bytes: entry.bytes,
                };
                if found
                    .insert(canonical.unwrap_or_else(|| native.clone()), tensor)
                    .is_some()
                {
                    return Err(shard.malformed(format!("the tensor {native} is in two shards")));
                }
            }
        }
        self.check_biases(model, &found)?;
        Ok(found)
    }

    /// The bytes of `tokenizer.json`.
    pub(super) fn tokenizer_json(&self) -> Result<&MappedFile, LoadError> {
        self.files
            .get("tokenizer.json")
            .map(AsRef::as_ref)
            .ok_or_else(|| LoadError::Tokenizer {
                path: self.path.clone(),
                detail: "the directory has no tokenizer.json".into(),
            })
    }

    /// The content of a special token that `tokenizer_config.json` names, such as `bos_token`.
    pub(super) fn special_token(&self, key: &str) -> Option<&str> {
        match self.tokenizer_config.as_ref()?.map.get(key)? {
            Value::String(content) => Some(content),
            Value::Object(token) => token.get("content")?.as_str(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => None,
        }
    }

    /// The chat template with the file that holds it.
    pub(super) fn chat_template(&self) -> Result<Option<(&Path, &str)>, LoadError> {
        if let Some(file) = self.files.get("chat_template.jinja") {
            let text =
                std::str::from_utf8(file).map_err(|error| file.malformed(format!("not UTF-8: {error}")))?;
            return Ok(Some((file.path(), text)));
        }
        let Some(config) = &self.tokenizer_config else {
            return Ok(None);
        };
        let source = match config.map.get("chat_template") {
            None | Some(Value::Null) => None,
            Some(Value::String(source)) => Some(source.as_str()),
            Some(Value::Array(named)) => named
                .iter()
                .find(|template| template.get("name").and_then(Value::as_str) == Some("default"))
                .and_then(|template| template.get("template"))
                .and_then(Value::as_str),
            Some(other) => return Err(config.bad_value("chat_template", other, "a string or a list")),
        };
        Ok(source.map(|source| (config.path.as_path(), source)))
    }

    fn architecture(&self) -> Result<&str, LoadError> {
        let architecture = self
            .config
            .map
            .get("architectures")
            .and_then(|architectures| architectures.get(0))
            .and_then(Value::as_str)
            .ok_or_else(|| self.config.missing("architectures"))?;
        match architecture {
            "LlamaForCausalLM" => Ok("llama"),
            "MistralForCausalLM" => Ok("mistral"),
            _ => Err(LoadError::UnsupportedArchitecture {
                path: self.config.path.clone(),
                architecture: architecture.to_owned(),
                supported: "LlamaForCausalLM and MistralForCausalLM",
            }),
        }
    }

    /// A window that the context never fills is none.
    fn refuse_sliding_windows(&self, context_tokens_max: usize) -> Result<(), LoadError> {
        let window = self.config.optional_size("sliding_window")?;
        let used = self.config.bool("use_sliding_window")?.unwrap_or(true);
        if let Some(window) = window.filter(|window| used && *window < context_tokens_max) {
            return Err(self
                .config
                .unsupported(format!("a sliding window of {window} tokens")));
        }
        let other = self
            .config
            .map
            .get("layer_types")
            .and_then(Value::as_array)
            .and_then(|layers| {
                layers
                    .iter()
                    .find(|layer| layer.as_str() != Some("full_attention"))
            });
        match other {
            Some(layer) => Err(self.config.unsupported(format!("a layer of type {layer}"))),
            None => Ok(()),
        }
    }

    /// `transformers` ignores biases that the configuration does not ask for; a file that has them all the same is
    /// ambiguous.
    fn check_biases(&self, model: &ModelConfig, found: &HashMap<String, Found>) -> Result<(), LoadError> {
        let attention = self.config.bool("attention_bias")?.unwrap_or(false);
        let feed_forward = self.config.bool("mlp_bias")?.unwrap_or(false);
        let groups: [(bool, &str, &[&str]); 2] = [
            (
                attention,
                "attention_bias",
                &["attn_q", "attn_k", "attn_v", "attn_output"],
            ),
            (feed_forward, "mlp_bias", &["ffn_gate", "ffn_up", "ffn_down"]),
        ];
        for layer in 0..model.layers {
            for (wanted, key, names) in groups {
                for name in names {
                    let canonical = format!("blk.{layer}.{name}.bias");
                    match (wanted, found.contains_key(&canonical)) {
                        (true, true) | (false, false) => {}
                        (true, false) => {
                            let tensor = native_name(&canonical);
                            return Err(LoadError::MissingTensor {
                                path: self.path.clone(),
                                tensor,
                            });
                        }
                        (false, true) => {
                            let tensor = native_name(&canonical);
                            let feature = format!("the tensor {tensor} without {key}");
                            return Err(self.config.unsupported(feature));
                        }
                    }
                }
            }
            // A number of layers beyond what is there is reported by the first missing weight.
            if !found.contains_key(&format!("blk.{layer}.attn_norm.weight")) {
                break;
            }
        }
        Ok(())
    }

    /// Generation stops where `generation_config.json` says, or else where `config.json` does.
    fn eos_tokens(&self, vocabulary: usize) -> Result<Vec<u32>, LoadError> {
        const KEY: &str = "eos_token_id";
        let generation = self
            .generation
            .as_ref()
            .filter(|object| object.map.get(KEY).is_some_and(|id| !id.is_null()));
        let object = generation.unwrap_or(&self.config);
        let ids: &[Value] = match object.map.get(KEY) {
            None | Some(Value::Null) => &[],
            Some(Value::Array(ids)) => ids,
            Some(id) => std::slice::from_ref(id),
        };
        let mut tokens = Vec::new();
        for id in ids {
            let id = id
                .as_u64()
                .ok_or_else(|| object.bad_value(KEY, id, "a token or a list of tokens"))?;
            limits::token(&object.path, KEY, id, vocabulary, &mut tokens)?;
        }
        Ok(tokens)
    }
}

impl Object {
    fn parse(file: &MappedFile) -> Result<Self, LoadError> {
        let map = serde_json::from_slice(file)
            .map_err(|error| file.malformed(format!("not a JSON object: {error}")))?;
        Ok(Self {
            path: file.path().to_owned(),
            map,
        })
    }

    /// An object within this one; `null` is as good as nothing.
    pub(super) fn object(&self, key: &str) -> Result<Option<Self>, LoadError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                path: self.path.clone(),
                map: map.clone(),
            })),
            Some(other) => Err(self.bad_value(key, other, "an object")),
        }
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
                Some(size) if (1..=limits::SIZE_MAX).contains(&size) => Ok(Some(size)),
                _ => Err(self.bad_value(
                    key,
                    value,
                    &format!("a whole number from 1 to {}", limits::SIZE_MAX),
                )),
            },
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize, LoadError> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(self.bad_value(key, value, "a number greater than 0")),
            },
        }
    }

    pub(super) fn positives(&self, key: &str) -> Result<Vec<f64>, LoadError> {
        let value = self.map.get(key).ok_or_else(|| self.missing(key))?;
        let numbers = value
            .as_array()
            .and_then(|array| array.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        numbers.ok_or_else(|| self.bad_value(key, value, "a list of numbers"))
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.bad_value(key, other, "true or false")),
        }
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.bad_value(key, other, "a string")),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn missing(&self, key: &str) -> LoadError {
        LoadError::MissingKey {
            path: self.path.clone(),
            key: key.to_owned(),
        }
    }

    pub(super) fn unsupported(&self, feature: String) -> LoadError {
        LoadError::UnsupportedFeature {
            path: self.path.clone(),
            feature,
        }
    }

    fn bad_value(&self, key: &str, value: &Value, expected: &str) -> LoadError {
        LoadError::BadValue {
            path: self.path.clone(),
            key: key.to_owned(),
            value: value.to_string(),
            expected: expected.to_owned(),
        }
    }
}

/// The name in a Hugging Face file of a tensor that ends in `.weight` or `.bias`.
pub(crate) fn native_name(canonical: &str) -> String {
    let (stem, kind) = canonical.rsplit_once('.').unwrap_or((canonical, "weight"));
    let stem = match stem {
        "token_embd" => "model.embed_tokens".to_owned(),
        "output_norm" => "model.norm".to_owned(),
        "output" => "lm_head".to_owned(),
        _ => match stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((layer, part)) => {
                let native = LAYER_NAMES
                    .iter()
                    .find(|(_, ours)| *ours == part)
                    .map_or(part, |(native, _)| *native);
                format!("model.layers.{layer}.{native}")
            }
            None => stem.to_owned(),
        },
    };
    format!("{stem}.{kind}")
}

/// Parts of a layer: `transformers`' name and the canonical one.
const LAYER_NAMES: [(&str, &str); 9] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

fn canonical_name(native: &str) -> Option<String> {
    let (stem, kind) = native.rsplit_once('.')?;
    let stem = match stem {
        "model.embed_tokens" => "token_embd".to_owned(),
        "model.norm" => "output_norm".to_owned(),
        "lm_head" => "output".to_owned(),
        _ => {
            let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
            let (_, ours) = LAYER_NAMES.iter().find(|(native, _)| *native == part)?;
            format!("blk.{}.{ours}", layer.parse::<u32>().ok()?)
        }
    };
    Some(format!("{stem}.{kind}"))
}

fn optional(directory: &Path, name: &str) -> Result<Option<Arc<MappedFile>>, LoadError> {
    let path = directory.join(name);
    if path.exists() {
        MappedFile::open(&path).map(|file| Some(Arc::new(file)))
    } else {
        Ok(None)
    }
}

/// The names of the weight files, each once.
fn shard_names(path: &Path) -> Result<BTreeSet<String>, LoadError> {
    let Some(index) = optional(path, "model.safetensors.index.json")? else {
        return Ok(BTreeSet::from(["model.safetensors".to_owned()]));
    };
    let object = Object::parse(&index)?;
    let map = object
        .object("weight_map")?
        .ok_or_else(|| object.missing("weight_map"))?;
    let mut names = BTreeSet::new();
    for (tensor, name) in &map.map {
        // A name that leads out of the directory is an attack, not a shard.
        let name = name
            .as_str()
            .filter(|name| Path::new(name).file_name().is_some_and(|file| file == *name));
        let name =
            name.ok_or_else(|| index.malformed(format!("weight_map sends {tensor} to no file name")))?;
        names.insert(name.to_owned());
    }
    if names.is_empty() || names.len() > SHARDS_MAX {
        let detail = format!(
            "weight_map names {} files, but must name 1 to {SHARDS_MAX}",
            names.len()
        );
        return Err(index.malformed(detail));
    }
    Ok(names)
}
