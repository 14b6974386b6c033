//! What a prompt's blocks are: from its text, its tokens or its hashes.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use node::task;
use serde_json::json;
use types::{BlockHash, Error, ErrorCode, KvSpace, Token};

use super::flags::PromptArgs;
use super::{ask, cache};
use crate::reach::Reached;

/// A text larger than this is no prompt.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// A prompt's full blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    /// Root of their space.
    pub(super) root: BlockHash,
    /// Their hashes, first one first.
    pub(super) chain: Vec<BlockHash>,
    pub(super) block_tokens: u64,
}

impl Prompt {
    /// Reads what the flags say, for the space of the cluster's nodes.
    pub(super) async fn read(flags: &PromptArgs, members: &[Reached]) -> anyhow::Result<Self> {
        let Some(space) = members.iter().find_map(|record| record.kv_space.clone()) else {
            return Err(Error::new(ErrorCode::NotFound, "the cluster has no node with a pool").into());
        };
        if let Some(hashes) = &flags.hashes {
            return Ok(of_hashes(&space, &flags.tenant, hashes)?);
        }
        let tokens = match (&flags.tokens, &flags.text, &flags.prompt_file) {
            (Some(tokens), _, _) => tokens.clone(),
            (None, Some(text), _) => tokenise(flags, &space, text.clone()).await?,
            (None, None, Some(path)) => tokenise(flags, &space, text_of(path)?).await?,
            (None, None, None) => {
                let message = "no prompt is given: --text, --prompt-file, --tokens or --hashes";
                return Err(Error::invalid("prompt", message).into());
            }
        };
        Ok(of_tokens(&space, &flags.tenant, &tokens)?)
    }

    /// The node that holds most of it, and how many blocks those are.
    pub(super) async fn holder(&self, members: &[Reached]) -> Result<(Reached, u64), Error> {
        let located = ask(members, async |record| cache(&record)?.locate(&self.chain).await).await;
        let most = located.into_iter().max_by_key(|(_, located)| located.held_blocks);
        most.filter(|(_, located)| located.held_blocks > 0)
            .map(|(record, located)| (record, located.held_blocks))
            .ok_or_else(|| {
                let message = format!("no node holds any of the prompt's {} blocks", self.chain.len());
                Error::new(ErrorCode::NotFound, message)
            })
    }
}

fn of_hashes(space: &KvSpace, tenant: &str, hashes: &[String]) -> Result<Prompt, Error> {
    let chain = hashes.iter().map(|text| {
        BlockHash::parse(text.trim())
            .ok_or_else(|| Error::invalid("hashes", format!("{text:?} is not 32 hexadecimal digits")))
    });
    Ok(Prompt {
        root: root(space, tenant),
        chain: chain.collect::<Result<_, _>>()?,
        block_tokens: space.layout.block_tokens as u64,
    })
}

fn of_tokens(space: &KvSpace, tenant: &str, tokens: &[Token]) -> Result<Prompt, Error> {
    let block_tokens = space.layout.block_tokens;
    let root = root(space, tenant);
    let chain = root.chain(tokens, block_tokens);
    if chain.is_empty() {
        let message = format!(
            "the prompt has {} tokens, but only full blocks of {block_tokens} are cached",
            tokens.len()
        );
        return Err(Error::invalid("prompt", message));
    }
    Ok(Prompt {
        root,
        chain,
        block_tokens: block_tokens as u64,
    })
}

fn root(space: &KvSpace, tenant: &str) -> BlockHash {
    match tenant {
        "" => space.root(),
        tenant => space.with_tenant(tenant).root(),
    }
}

fn text_of(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorCode::NotFound,
            _ => ErrorCode::Invalid,
        };
        Error::new(code, format!("{}: {error}", path.display()))
    })?;
    file.take(TEXT_BYTES_MAX)
        .read_to_string(&mut text)
        .with_context(|| format!("read {}", path.display()))?;
    Ok(text)
}

/// Turns text into tokens as the router does.
async fn tokenise(flags: &PromptArgs, space: &KvSpace, text: String) -> anyhow::Result<Vec<Token>> {
    let Some(path) = flags.model.clone() else {
        let message = "text needs the model's tokenizer: --model PATH, or give --tokens or --hashes";
        return Err(Error::invalid("model", message).into());
    };
    let opened = task::blocking("model-open", move || router::Model::open(&path, "cache")).await?;
    let model = opened.map_err(Error::from)?;
    if model.digest() != space.model_digest {
        let message = format!(
            "the model's digest is {}, but the cluster's blocks are of {}",
            model.digest(),
            space.model_digest
        );
        return Err(Error::new(ErrorCode::Conflict, message).into());
    }
    if !flags.chat {
        return Ok(model.tokens_of_text(&text));
    }
    let now_unix_s = node::clock::unix_s(std::time::SystemTime::now());
    Ok(model.tokens_of_chat(&[json!({ "role": "user", "content": text })], now_unix_s)?)
}

#[cfg(test)]
mod tests {
    use types::{KvDtype, KvLayout};

    use super::*;

    fn space() -> KvSpace {
        KvSpace {
            model_digest: "00aa".into(),
            arithmetic: "fast/1".into(),
            layout: KvLayout {
                layers: 2,
                kv_heads: 1,
                head_dim: 8,
                block_tokens: 8,
                dtype: KvDtype::F16,
            },
            adapter: None,
            tenant_salt: String::new(),
        }
    }

    #[test]
    fn a_prompt_is_the_same_by_its_tokens_and_by_its_hashes() {
        let tokens: Vec<Token> = (0..20).collect();
        let by_tokens = of_tokens(&space(), "", &tokens).expect("two blocks");
        assert_eq!(by_tokens.chain, space().root().chain(&tokens, 8));
        let hashes: Vec<String> = by_tokens.chain.iter().map(ToString::to_string).collect();
        assert_eq!(of_hashes(&space(), "", &hashes), Ok(by_tokens.clone()));
        assert_ne!(
            of_tokens(&space(), "a", &tokens).expect("two blocks").chain,
            by_tokens.chain,
            "tenants share nothing"
        );
    }

    #[test]
    fn what_is_no_prompt_is_refused() {
        let short = of_tokens(&space(), "", &[1, 2, 3]).expect_err("no full block");
        assert_eq!(
            (short.code, short.message.contains("3 tokens")),
            (ErrorCode::Invalid, true)
        );
        assert!(of_hashes(&space(), "", &["xyz".to_owned()]).is_err());
    }
}
