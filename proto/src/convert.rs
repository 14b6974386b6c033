//! Wire to domain and back. Everything from the wire is checked here, once, by its receiver.

use std::num::NonZeroU32;

use types::{
    BlockEvent, BlockHash, DrainProgress, Error, ErrorCode, HostFacts, LoadReport, NodeRecord, Priority,
    RequestId, SamplingParams, TenantQuota, Tier, Token, TokenLogprob,
};

use crate::v1;

/// Reads 16 bytes.
pub fn hash(field: &str, bytes: &[u8]) -> Result<BlockHash, Error> {
    <[u8; 16]>::try_from(bytes).map(BlockHash).map_err(|_| {
        Error::invalid(
            field,
            format!("{field} has {} bytes, but a hash has 16", bytes.len()),
        )
    })
}

/// Reads a list of hashes.
pub fn hashes(field: &str, list: &[Vec<u8>]) -> Result<Vec<BlockHash>, Error> {
    list.iter().map(|bytes| hash(field, bytes)).collect()
}

/// The wire form of hashes.
pub fn hashes_to_wire(list: &[BlockHash]) -> Vec<Vec<u8>> {
    list.iter().map(|hash| hash.0.to_vec()).collect()
}

/// Reads the hashes of a chain, of which there may be `max`.
pub fn chain(field: &str, wire: Option<&v1::BlockChain>, max: usize) -> Result<Vec<BlockHash>, Error> {
    let bytes = wire.map_or(&[][..], |chain| &chain.hashes);
    let (hashes, rest) = bytes.as_chunks::<16>();
    if !rest.is_empty() {
        let len = bytes.len();
        return Err(Error::invalid(
            field,
            format!("{field} has {len} bytes, which is no multiple of 16"),
        ));
    }
    if hashes.len() > max {
        let given = hashes.len();
        return Err(Error::invalid(
            field,
            format!("{field} names {given} blocks, but at most {max} are allowed"),
        ));
    }
    Ok(hashes.iter().map(|hash| BlockHash(*hash)).collect())
}

/// The wire form of a chain.
pub fn chain_to_wire(chain: &[BlockHash]) -> v1::BlockChain {
    v1::BlockChain {
        hashes: chain.iter().flat_map(|hash| hash.0).collect(),
    }
}

/// Reads a request id.
pub fn request_id(text: &str) -> Result<RequestId, Error> {
    RequestId::parse(text).ok_or_else(|| {
        Error::invalid(
            "request_id",
            format!("request_id is {text:?}, but must be 32 hexadecimal digits"),
        )
    })
}

/// Reads a priority; empty is the usual one.
pub fn priority(text: &str) -> Result<Priority, Error> {
    if text.is_empty() {
        return Ok(Priority::default());
    }
    Priority::parse(text).ok_or_else(|| {
        Error::invalid(
            "priority",
            format!("priority is {text:?}, but must be low, normal or high"),
        )
    })
}

/// Reads sampling parameters; absent ones take their defaults. Ranges are checked by
/// [`SamplingParams::validate`], which needs the model's vocabulary.
pub fn sampling(wire: Option<v1::Sampling>) -> Result<SamplingParams, Error> {
    let Some(wire) = wire else {
        return Ok(SamplingParams::default());
    };
    let v1::Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
        max_tokens,
        stop,
        stop_tokens,
        ignore_eos,
        logprobs,
    } = wire;
    let default = SamplingParams::default();
    Ok(SamplingParams {
        temperature: temperature.unwrap_or(default.temperature),
        top_k: top_k.unwrap_or(default.top_k),
        top_p: top_p.unwrap_or(default.top_p),
        min_p: min_p.unwrap_or(default.min_p),
        repetition_penalty: repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: frequency_penalty.unwrap_or(default.frequency_penalty),
        logit_bias: logit_bias.into_iter().collect(),
        seed: seed.unwrap_or(default.seed),
        max_tokens: match max_tokens {
            None => default.max_tokens,
            // More than any context holds: the context is then the limit.
            Some(value) => u32::try_from(value).unwrap_or(u32::MAX),
        },
        stop,
        stop_tokens,
        ignore_eos,
        logprobs: match logprobs {
            None => None,
            Some(count) => Some(u8::try_from(count).map_err(|_| {
                Error::invalid(
                    "top_logprobs",
                    format!("top_logprobs is {count}, but at most 20 are allowed"),
                )
            })?),
        },
    })
}

/// The wire form of sampling parameters, with every field set.
pub fn sampling_to_wire(params: &SamplingParams) -> v1::Sampling {
    let SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        seed,
        max_tokens,
        stop,
        stop_tokens,
        ignore_eos,
        logprobs,
    } = params;
    v1::Sampling {
        temperature: Some(*temperature),
        top_k: Some(*top_k),
        top_p: Some(*top_p),
        min_p: Some(*min_p),
        repetition_penalty: Some(*repetition_penalty),
        presence_penalty: Some(*presence_penalty),
        frequency_penalty: Some(*frequency_penalty),
        logit_bias: logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
        seed: Some(*seed),
        max_tokens: Some(u64::from(*max_tokens)),
        stop: stop.clone(),
        stop_tokens: stop_tokens.clone(),
        ignore_eos: *ignore_eos,
        logprobs: logprobs.map(u32::from),
    }
}

/// The wire form of a log-probability; `text` gives each alternative's bytes.
pub fn logprob_to_wire(logprob: &TokenLogprob, text: impl Fn(Token) -> Vec<u8>) -> v1::TokenLogprob {
    let top = logprob.top.iter();
    v1::TokenLogprob {
        logprob: logprob.logprob,
        top: top
            .map(|(token, value)| v1::TopLogprob {
                token: *token,
                logprob: *value,
                text: text(*token),
            })
            .collect(),
    }
}

/// The domain form of a log-probability.
pub fn logprob(wire: &v1::TokenLogprob) -> TokenLogprob {
    TokenLogprob {
        logprob: wire.logprob,
        top: wire.top.iter().map(|top| (top.token, top.logprob)).collect(),
    }
}

/// The wire form of a log event.
pub fn event_to_wire(event: &BlockEvent) -> v1::BlockEvent {
    use v1::block_event::Event;
    let event = match event {
        BlockEvent::Stored { hash, parent, tier } => Event::Stored(v1::BlockStored {
            hash: hash.0.to_vec(),
            parent: parent.0.to_vec(),
            tier: tier_to_wire(*tier).into(),
        }),
        BlockEvent::Moved { hash, tier } => Event::Moved(v1::BlockMoved {
            hash: hash.0.to_vec(),
            tier: tier_to_wire(*tier).into(),
        }),
        BlockEvent::Removed { hash } => Event::Removed(v1::BlockRemoved {
            hash: hash.0.to_vec(),
        }),
    };
    v1::BlockEvent { event: Some(event) }
}

/// Reads a log event.
pub fn event(wire: &v1::BlockEvent) -> Result<BlockEvent, Error> {
    use v1::block_event::Event;
    match &wire.event {
        Some(Event::Stored(stored)) => Ok(BlockEvent::Stored {
            hash: hash("hash", &stored.hash)?,
            parent: hash("parent", &stored.parent)?,
            tier: tier(stored.tier())?,
        }),
        Some(Event::Moved(moved)) => Ok(BlockEvent::Moved {
            hash: hash("hash", &moved.hash)?,
            tier: tier(moved.tier())?,
        }),
        Some(Event::Removed(removed)) => Ok(BlockEvent::Removed {
            hash: hash("hash", &removed.hash)?,
        }),
        None => Err(Error::invalid("event", "a log event is empty")),
    }
}

fn tier_to_wire(tier: Tier) -> v1::Tier {
    match tier {
        Tier::Device => v1::Tier::Device,
        Tier::Host => v1::Tier::Host,
        Tier::Disk => v1::Tier::Disk,
    }
}

fn tier(wire: v1::Tier) -> Result<Tier, Error> {
    match wire {
        v1::Tier::Device => Ok(Tier::Device),
        v1::Tier::Host => Ok(Tier::Host),
        v1::Tier::Disk => Ok(Tier::Disk),
        v1::Tier::Unspecified => Err(Error::invalid("tier", "a log event names no tier")),
    }
}

/// The wire form of a load report.
pub fn load_to_wire(report: &LoadReport) -> v1::LoadReport {
    let LoadReport {
        sequence,
        queued_requests,
        queued_prefill_tokens,
        running_sequences,
        resident_tokens,
        free_blocks,
        evictable_blocks,
        prefill_ms_per_token,
        prefill_ms_per_token_kilocontext,
        decode_step_ms,
        transfer_bytes_per_ms,
        disk_bytes_per_ms,
        draining,
        drain,
        disk_blocks,
        disk_capacity_blocks,
        cordoned,
    } = *report;
    v1::LoadReport {
        sequence,
        queued_requests,
        queued_prefill_tokens,
        running_sequences,
        resident_tokens,
        free_blocks,
        evictable_blocks,
        prefill_ms_per_token,
        prefill_ms_per_token_kilocontext,
        decode_step_ms,
        transfer_bytes_per_ms,
        disk_bytes_per_ms,
        draining,
        drain: drain.map(|progress| v1::DrainProgress {
            requests: progress.requests,
            blocks: progress.blocks,
            done: progress.done,
        }),
        disk_blocks,
        disk_capacity_blocks,
        cordoned,
    }
}

/// Reads a load report. A rate that is no finite, non-negative number counts as not measured.
pub fn load(wire: &v1::LoadReport) -> LoadReport {
    let rate = |value: f64| {
        if value.is_finite() && value >= 0.0 {
            value
        } else {
            0.0
        }
    };
    LoadReport {
        sequence: wire.sequence,
        queued_requests: wire.queued_requests,
        queued_prefill_tokens: wire.queued_prefill_tokens,
        running_sequences: wire.running_sequences,
        resident_tokens: wire.resident_tokens,
        free_blocks: wire.free_blocks,
        evictable_blocks: wire.evictable_blocks,
        prefill_ms_per_token: rate(wire.prefill_ms_per_token),
        prefill_ms_per_token_kilocontext: rate(wire.prefill_ms_per_token_kilocontext),
        decode_step_ms: rate(wire.decode_step_ms),
        transfer_bytes_per_ms: rate(wire.transfer_bytes_per_ms),
        disk_bytes_per_ms: rate(wire.disk_bytes_per_ms),
        draining: wire.draining,
        drain: wire.drain.map(|progress| DrainProgress {
            requests: progress.requests,
            blocks: progress.blocks,
            done: progress.done,
        }),
        disk_blocks: wire.disk_blocks,
        disk_capacity_blocks: wire.disk_capacity_blocks,
        cordoned: wire.cordoned,
    }
}

/// The wire form of what a host offers: JSON, since it is for people and grows with what they ask.
pub fn host_to_json(facts: &HostFacts) -> String {
    serde_json::to_string(facts).expect("facts have string keys only")
}

/// Reads what a host offers. Facts that the sender does not know of are as if they were not found.
pub fn host(json: &str) -> Result<HostFacts, Error> {
    serde_json::from_str(json)
        .map_err(|error| Error::new(ErrorCode::Invalid, format!("host facts cannot be read: {error}")))
}

/// The registry's form of a node's record: JSON, so that `etcdctl get` shows it to a person.
pub fn record_to_json(record: &NodeRecord) -> String {
    serde_json::to_string(record).expect("a record has string keys only")
}

/// Reads a node's record.
pub fn record(json: &str) -> Result<NodeRecord, Error> {
    let record: NodeRecord = serde_json::from_str(json)
        .map_err(|error| Error::new(ErrorCode::Invalid, format!("node record cannot be read: {error}")))?;
    if let Some(space) = &record.kv_space {
        space.layout.validate().map_err(|error| {
            Error::new(
                ErrorCode::Invalid,
                format!("node {} has an unusable KV layout: {error}", record.id),
            )
        })?;
    }
    Ok(record)
}

/// A quota as messages carry it.
pub fn quota_to_wire(quota: &TenantQuota) -> v1::TenantQuota {
    v1::TenantQuota {
        bytes_max: quota.bytes_max,
        weight: quota.weight.map(NonZeroU32::get),
    }
}

/// Reads a quota. One that is not there is empty.
pub fn quota(wire: Option<&v1::TenantQuota>) -> Result<TenantQuota, Error> {
    let Some(v1::TenantQuota { bytes_max, weight }) = wire else {
        return Ok(TenantQuota::default());
    };
    let weight = weight.map(|weight| {
        NonZeroU32::new(weight).ok_or_else(|| Error::invalid("weight", "weight is 0, but must be at least 1"))
    });
    Ok(TenantQuota {
        bytes_max: *bytes_max,
        weight: weight.transpose()?,
    })
}

/// The registry's form of a quota: JSON, as for records.
pub fn quota_to_json(quota: &TenantQuota) -> String {
    serde_json::to_string(quota).expect("a quota has string keys only")
}

/// Reads the registry's form of a quota.
pub fn quota_from_json(json: &str) -> Result<TenantQuota, Error> {
    let read = serde_json::from_str(json);
    read.map_err(|error| {
        Error::new(
            ErrorCode::Invalid,
            format!("tenant quota cannot be read: {error}"),
        )
    })
}

#[cfg(test)]
mod tests;
