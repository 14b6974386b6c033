//! Owns a request's life: receives KV, batches, streams tokens.
