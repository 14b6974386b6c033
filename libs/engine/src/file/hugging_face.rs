//! A model directory as Hugging Face's `save_pretrained` writes it.
//!
//! `config.json` and safetensors shards are required; `generation_config.json`, `tokenizer_config.json` and
//! `chat_template.jinja` are read when they are there. Keys and defaults are those of `transformers`.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Map, Value};

use super::{
    LoadError, hugging_face_config, limits, mapped::MappedFile, names::Names, safetensors, shapes::Found,
};
use crate::{
    config::ModelConfig,
    family::{Biases, Wrapper},
};

/// Mixture models of a trillion parameters have some hundred.
const SHARDS_MAX: usize = 1024;
/// The parsed JSON files and the mapped shards.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Of the text model.
    config: Object,
    /// The class that the text model is in, if it is.
    wrapper: Option<&'static Wrapper>,
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
        let (config, wrapper) = hugging_face_config::text_model(config)?;
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
            wrapper,
            generation,
            tokenizer_config,
            shards,
            files,
        })
    }

    /// Reads the configuration.
    pub(super) fn config(&self) -> Result<ModelConfig, LoadError> {
        let name = self
            .path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        hugging_face_config::config(&self.config, name, |vocabulary| self.eos_tokens(vocabulary))
    }

    /// The tensors by canonical name. Those that are only a copy of something else are left out.
    pub(super) fn tensors(&self, model: &ModelConfig) -> Result<HashMap<String, Found>, LoadError> {
        let names = Names::new(model.family);
        let mut found = HashMap::new();
        for shard in &self.shards {
            for (native, entry) in safetensors::parse(shard)? {
                let Some(own) = self.own_name(&native) else {
                    continue;
                };
                let canonical = names.canonical(&own);
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
        self.check_biases(model, &names, &found)?;
        Ok(found)
    }

    /// The name that a tensor would have if the text model were alone; `None` if it is none of its tensors.
    fn own_name<'a>(&self, native: &'a str) -> Option<Cow<'a, str>> {
        let Some(wrapper) = self.wrapper else {
            return Some(native.into());
        };
        if wrapper.others.iter().any(|other| native.starts_with(other)) {
            return None;
        }
        let own = wrapper.prefixes.iter().find_map(|(before, without)| {
            let rest = native.strip_prefix(before)?;
            Some(format!("{without}{rest}").into())
        });
        Some(own.unwrap_or_else(|| native.into()))
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

    /// `transformers` ignores biases that the configuration does not ask for; a file that has them all the same is
    /// ambiguous.
    fn check_biases(
        &self,
        model: &ModelConfig,
        names: &Names,
        found: &HashMap<String, Found>,
    ) -> Result<(), LoadError> {
        const KEY: &str = "attention_bias";
        if model.family.biases != Biases::Configured || model.family.fused {
            return Ok(());
        }
        let wanted = self.config.bool(KEY)?.unwrap_or(false);
        for layer in 0..model.layers {
            for name in ["attn_q", "attn_k", "attn_v", "attn_output"] {
                let canonical = format!("blk.{layer}.{name}.bias");
                let tensor = || names.native(&canonical);
                match (wanted, found.contains_key(&canonical)) {
                    (true, true) | (false, false) => {}
                    (true, false) => {
                        return Err(LoadError::MissingTensor {
                            path: self.path.clone(),
                            tensor: tensor(),
                        });
                    }
                    (false, true) => {
                        let feature = format!("the tensor {} without {KEY}", tensor());
                        return Err(self.config.unsupported(feature));
                    }
                }
            }
            // A number of layers beyond what is there is reported by the first missing weight.
            if !found.contains_key(&format!("blk.{layer}.attn_output.weight")) {
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

    /// With these keys where it has none of them.
    pub(super) fn with(mut self, others: impl IntoIterator<Item = (&'static str, Value)>) -> Self {
        for (key, value) in others {
            self.map.entry(key).or_insert(value);
        }
        self
    }

    /// Sizes that are to be taken for those that are missing.
    pub(super) fn with_defaults(self, defaults: &'static [(&'static str, u64)]) -> Self {
        self.with(defaults.iter().map(|(key, value)| (*key, (*value).into())))
    }

    /// As of this class, whatever it says.
    pub(super) fn with_class(mut self, class: &str) -> Self {
        self.map.insert("architectures".into(), vec![class].into());
        self
    }

    /// As it is, `null` included.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key)
    }

    /// A size that may be 0.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, LoadError> {
        match self.map.get(key).and_then(Value::as_u64) {
            Some(0) => Ok(Some(0)),
            Some(_) | None => self.optional_size(key),
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
        self.bad(key, value, expected)
    }

    pub(super) fn bad(&self, key: &str, value: impl ToString, expected: &str) -> LoadError {
        LoadError::BadValue {
            path: self.path.clone(),
            key: key.to_owned(),
            value: value.to_string(),
            expected: expected.to_owned(),
        }
    }
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
