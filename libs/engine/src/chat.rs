//! Chat templates: from messages to the text that a model was trained on.
//!
//! A template is a Jinja program in the model's file. It runs in `minijinja`, set up as `transformers` sets up Jinja
//! (`chat_template_utils.py`): blocks trim the line they are on, `raise_exception` and `strftime_now` exist, `tojson` does not
//! escape for HTML, and values have Python's methods (`methods.rs`).
//!
//! Invariant: a template is foreign code. It cannot reach files or the network, and its fuel bounds both its time and
//! its memory.

mod clock;
mod methods;

use minijinja::{
    AutoEscape, Environment, ErrorKind, State, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use types::ErrorCode;

/// One unit is an instruction or 64 bytes of data. The largest known templates take some hundred per message, so this is
/// for ten thousand messages, or 256 MiB of text.
const FUEL_PER_RENDER: u64 = 4_000_000;
/// Deepest nesting of calls and includes.
const RECURSION_MAX: usize = 64;
/// The only template of its environment.
const NAME: &str = "chat";
/// Where `strftime_now` finds the time of the rendering.
const NOW_VARIABLE: &str = "__now_unix_s";

/// Why a conversation could not be rendered. All are faults of the conversation or of the template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The template is not valid Jinja.
    #[error("the chat template is invalid: {0}")]
    Syntax(String),
    /// The template itself refused the conversation.
    #[error("the chat template refuses these messages: {0}")]
    Refused(String),
    /// The template does not finish within its bounds.
    #[error("the chat template takes too long or makes too much text")]
    TooExpensive,
    /// The template failed, for example because a message lacks a field.
    #[error("the chat template failed: {0}")]
    Failed(String),
}

impl ChatError {
    /// What a caller can do about it.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Syntax(_) | Self::Refused(_) | Self::TooExpensive | Self::Failed(_) => ErrorCode::Invalid,
        }
    }
}

impl From<ChatError> for types::Error {
    fn from(error: ChatError) -> Self {
        match error.code() {
            ErrorCode::Invalid => Self::invalid("messages", error.to_string()),
            code => Self::new(code, error.to_string()),
        }
    }
}

/// What a rendering takes besides the messages.
#[derive(Debug, Clone, Default)]
pub struct ChatOptions {
    /// Ends the text with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Seconds since 1970, for templates that tell the model the date (in UTC).
    pub now_unix_s: u64,
    /// Further variables, such as `tools`.
    pub variables: serde_json::Map<String, serde_json::Value>,
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles `source`. The texts of the special tokens are its variables `bos_token` and `eos_token`.
    ///
    /// # Errors
    ///
    /// [`ChatError::Syntax`].
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL_PER_RENDER));
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_unknown_method_callback(methods::call);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| ChatError::Syntax(error.to_string()))?;
        Ok(Self {
            environment,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// The text of a conversation. Each message is an object with at least `role` and `content`.
    ///
    /// # Errors
    ///
    /// Every [`ChatError`] but `Syntax`.
    pub fn render(&self, messages: &[serde_json::Value], options: &ChatOptions) -> Result<String, ChatError> {
        let ChatOptions {
            add_generation_prompt,
            now_unix_s,
            variables,
        } = options;
        // As in `transformers`, what is absent is `none` and not undefined: templates ask `is not none`.
        let mut context = serde_json::json!({ "tools": null, "documents": null });
        let map = context.as_object_mut().expect("an object was just made");
        map.extend(
            variables
                .iter()
                .map(|(name, value)| (name.clone(), value.clone())),
        );
        map.insert("messages".into(), messages.into());
        map.insert("add_generation_prompt".into(), (*add_generation_prompt).into());
        map.insert("bos_token".into(), self.bos_token.as_str().into());
        map.insert("eos_token".into(), self.eos_token.as_str().into());
        map.insert(NOW_VARIABLE.into(), (*now_unix_s).into());
        let template = self
            .environment
            .get_template(NAME)
            .expect("the template was added when this was made");
        template.render(Serde(&context)).map_err(render_error)
    }
}

fn render_error(error: minijinja::Error) -> ChatError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return ChatError::Refused(message.clone());
        }
        cause = current.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => ChatError::TooExpensive,
        _ => ChatError::Failed(error.to_string()),
    }
}

/// Carries a template's own message through the engine's errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception was called");
    Err(error.with_source(Raised(message)))
}

fn strftime_now(state: &State<'_, '_>, format: &str) -> Result<String, minijinja::Error> {
    let now = state
        .lookup(NOW_VARIABLE)
        .and_then(|now| u64::try_from(now).ok())
        .unwrap_or(0);
    clock::format_utc(now, format).map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, arguments: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    // The one that `transformers` has anyway.
    let _: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    let mut out = Vec::new();
    let result = match indent {
        Some(spaces) if spaces <= 64 => {
            let indent = " ".repeat(spaces);
            value.serialize(&mut Serializer::with_formatter(
                &mut out,
                PrettyFormatter::with_indent(indent.as_bytes()),
            ))
        }
        Some(spaces) => {
            let message = format!("an indent of {spaces} is more than 64");
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, PythonSpacing)),
    };
    result.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from(String::from_utf8(out).expect("JSON is UTF-8")))
}

/// `", "` and `": "`, as Python separates.
struct PythonSpacing;

impl Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests;
