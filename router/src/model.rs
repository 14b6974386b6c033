//! What the router knows of the model: enough to turn text into tokens. It loads no weights.

use std::path::Path;

use engine::chat::{ChatOptions, ChatTemplate};
use engine::file::{LoadError, ModelFile};
use engine::tokenizer::Tokenizer;
use types::{Error, Token};

/// A model as clients name it.
#[derive(Debug)]
pub struct Model {
    name: String,
    digest: String,
    tokenizer: Tokenizer,
    chat_template: Option<ChatTemplate>,
    vocabulary: usize,
    context_tokens_max: u64,
}

impl Model {
    /// Reads tokenizer, chat template and digest from a model's file, which takes as long as reading the file once. `name` is
    /// what clients call it; the nodes of the model must be registered under the same name.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is no model that we can serve.
    pub fn open(path: &Path, name: impl Into<String>) -> Result<Self, LoadError> {
        let file = ModelFile::open(path)?;
        let tokenizer = file.tokenizer()?;
        let chat_template = file.chat_template(&tokenizer)?;
        Ok(Self {
            name: name.into(),
            digest: file.digest().to_owned(),
            tokenizer,
            chat_template,
            vocabulary: file.config().vocabulary,
            context_tokens_max: file.config().context_tokens_max as u64,
        })
    }

    /// What clients call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// BLAKE3 of its files: nodes with another one serve another model, whatever its name.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Number of token ids that its embedding has.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Longest sequence that it was made for, in tokens.
    pub fn context_tokens_max(&self) -> u64 {
        self.context_tokens_max
    }

    /// The tokens of a text. The names of special tokens in it are these tokens: whoever writes a raw prompt writes
    /// the model's own format.
    pub fn tokens_of_text(&self, text: &str) -> Vec<Token> {
        let mut tokens = self.tokenizer.encode(text, true);
        if let Some(bos) = self.tokenizer.bos().filter(|_| self.tokenizer.add_bos())
            && !text.is_empty()
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        tokens
    }

    /// The tokens of a conversation, up to the point where the assistant speaks.
    ///
    /// # Errors
    ///
    /// The model has no chat template, or the template refuses the conversation.
    pub fn tokens_of_chat(
        &self,
        messages: &[serde_json::Value],
        now_unix_s: u64,
    ) -> Result<Vec<Token>, Error> {
        let Some(template) = &self.chat_template else {
            let reason = format!("model {} has no chat template: send a prompt instead", self.name);
            return Err(Error::invalid("messages", reason));
        };
        let options = ChatOptions {
            add_generation_prompt: true,
            now_unix_s,
            ..ChatOptions::default()
        };
        let text = template.render(messages, &options)?;
        // The template writes the begin-of-sequence token by itself.
        Ok(self.tokenizer.encode(&text, true))
    }

    /// The bytes of one token, which need not be UTF-8 by themselves.
    pub fn token_bytes(&self, token: Token) -> &[u8] {
        self.tokenizer.token_bytes(token)
    }
}
