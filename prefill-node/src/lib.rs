//! Turns prompts into KV blocks and a first token.
