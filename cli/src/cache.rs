//! `perigee cache`: the cached blocks of all nodes.
//!
//! A prompt is named by its text, its tokens or its block hashes (`prompt.rs`). What a command asks of several nodes it asks at
//! once; a node that does not answer is said on stderr, and the others' answers still count.

mod file;
mod flags;
mod prompt;
mod tenants;

use std::io::{BufRead, IsTerminal};
use std::time::Duration;

use client::{Cache, Store};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use types::{Error, ErrorCode};

use crate::nodes;
use crate::output::{self, Format};
use crate::reach::{Reached, Router};
pub(crate) use flags::CacheCommand;
use flags::{EvictArgs, PinArgs, TopArgs, UnpinArgs, WarmArgs};
use prompt::Prompt;

/// Nodes that are asked at a time.
const ASKED_MAX: usize = 32;
/// Longest wait for a node that fetches a prefix.
const WARM_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs one of the commands.
pub(crate) async fn run(command: CacheCommand, router: &Router, format: Format) -> anyhow::Result<()> {
    let members = members(router).await?;
    match command {
        CacheCommand::Stats => stats(&members, format).await,
        CacheCommand::Top(flags) => top(&flags, &members, format).await,
        CacheCommand::Locate(flags) => locate(&Prompt::read(&flags, &members).await?, &members, format).await,
        CacheCommand::Pin(flags) => pin(&flags, &members, format).await,
        CacheCommand::Unpin(flags) => unpin(&flags, &members, format).await,
        CacheCommand::Pins => pins(&members, format).await,
        CacheCommand::Evict(flags) => evict(&flags, &members, format).await,
        CacheCommand::Warm(flags) => warm(&flags, &members, format).await,
        CacheCommand::Verify { node } => verify(node.as_deref(), &members, format).await,
        CacheCommand::Export(flags) => {
            let prompt = Prompt::read(&flags.prompt, &members).await?;
            file::export(&flags, &prompt, &members, format).await
        }
        CacheCommand::Import(flags) => file::import(&flags, &members, format).await,
    }
}

async fn stats(members: &[Reached], format: Format) -> anyhow::Result<()> {
    let answers = ask(members, async |record| {
        Store::new(record.channel()?).stats().await
    })
    .await;
    if format == Format::Json {
        let nodes = answers.iter().map(|(record, stats)| {
            json!({
                "id": record.id,
                "role": record.role,
                "block_bytes": stats.block_bytes,
                "capacity_blocks": stats.capacity_blocks,
                "free_blocks": stats.free_blocks,
                "cached_blocks": stats.cached_blocks,
                "pinned_blocks": stats.pinned_blocks,
                "hits": stats.hits,
                "misses": stats.misses,
                "evictions": stats.evictions,
                "corruptions": stats.corruptions,
                "object_tier": stats.object_tier.as_ref().map(|tier| json!({
                    "usable": tier.usable,
                    "read_bytes": tier.read_bytes,
                    "written_bytes": tier.written_bytes,
                    "missed_segments": tier.missed_segments,
                    "errors": tier.errors,
                    "corruptions": tier.corruptions,
                })),
                "tenants": tenants::to_json(stats),
            })
        });
        return output::print_json(&json!({ "nodes": nodes.collect::<Vec<_>>() }));
    }
    let mut table = output::table(&[
        "NODE",
        "ROLE",
        "POOL",
        "CACHED",
        "IN USE",
        "FREE",
        "HITS",
        "MISSES",
        "HIT RATIO",
        "EVICTED",
        "CORRUPT",
        "BUCKET",
    ]);
    for (record, stats) in &answers {
        let asked = stats.hits + stats.misses;
        table.add_row([
            record.id.to_string(),
            record.role.to_string(),
            output::bytes(stats.capacity_blocks * stats.block_bytes),
            output::bytes(stats.cached_blocks * stats.block_bytes),
            output::bytes(stats.pinned_blocks * stats.block_bytes),
            output::bytes(stats.free_blocks * stats.block_bytes),
            stats.hits.to_string(),
            stats.misses.to_string(),
            match asked {
                0 => "-".to_owned(),
                asked => format!("{:.1} %", 100.0 * stats.hits as f64 / asked as f64),
            },
            stats.evictions.to_string(),
            stats.corruptions.to_string(),
            match &stats.object_tier {
                None => "-".to_owned(),
                Some(tier) if !tier.usable => "bypassed".to_owned(),
                Some(tier) => format!(
                    "{} in, {} out",
                    output::bytes(tier.written_bytes),
                    output::bytes(tier.read_bytes)
                ),
            },
        ]);
    }
    output::print_table(&table)?;
    tenants::print(&answers)
}

async fn top(flags: &TopArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let members = chosen(members, flags.node.as_deref())?;
    let (count, coldest) = (flags.count, flags.coldest);
    let answers = ask(&members, async |record| cache(&record)?.top(count, coldest).await).await;
    let mut blocks: Vec<_> = answers
        .iter()
        .flat_map(|(record, blocks)| blocks.iter().map(move |block| (record, block)))
        .collect();
    blocks.sort_by(|(_, a), (_, b)| {
        let order = b.worth.total_cmp(&a.worth);
        if coldest { order.reverse() } else { order }
    });
    blocks.truncate(usize::try_from(count).unwrap_or(usize::MAX));
    if format == Format::Json {
        let blocks = blocks.iter().map(|(record, block)| {
            json!({
                "node": record.id,
                "hash": block.hash,
                "depth": block.depth,
                "pins": block.pins,
                "children": block.children,
                "worth": block.worth,
            })
        });
        return output::print_json(&json!({ "blocks": blocks.collect::<Vec<_>>() }));
    }
    let mut table = output::table(&["NODE", "BLOCK", "DEPTH", "HELD BY", "CONTINUED BY", "WORTH"]);
    for (record, block) in blocks {
        table.add_row([
            record.id.to_string(),
            block.hash.to_string(),
            block.depth.to_string(),
            block.pins.to_string(),
            block.children.to_string(),
            format!("{:.3}", block.worth),
        ]);
    }
    Ok(output::print_table(&table)?)
}

async fn locate(prompt: &Prompt, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let answers = ask(members, async |record| {
        cache(&record)?.locate(&prompt.chain).await
    })
    .await;
    if format == Format::Json {
        let nodes = answers.iter().map(|(record, located)| {
            json!({
                "id": record.id,
                "held_blocks": located.held_blocks,
                "held_tokens": located.held_blocks * prompt.block_tokens,
                "used_blocks": located.used_blocks,
                "worth": located.worth,
            })
        });
        return output::print_json(&json!({
            "blocks": prompt.chain.len(),
            "hashes": prompt.chain,
            "nodes": nodes.collect::<Vec<_>>(),
        }));
    }
    let mut table = output::table(&["NODE", "HELD BLOCKS", "HELD TOKENS", "IN USE", "WORTH"]);
    for (record, located) in &answers {
        table.add_row([
            record.id.to_string(),
            format!("{}/{}", located.held_blocks, prompt.chain.len()),
            (located.held_blocks * prompt.block_tokens).to_string(),
            located.used_blocks.to_string(),
            match located.held_blocks {
                0 => "-".to_owned(),
                _ => format!("{:.3}", located.worth),
            },
        ]);
    }
    Ok(output::print_table(&table)?)
}

async fn pin(flags: &PinArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let prompt = Prompt::read(&flags.prompt, members).await?;
    let holder = match &flags.node {
        Some(id) => find(members, id)?.clone(),
        None => prompt.holder(members).await?.0,
    };
    let ttl = flags.ttl.map(|ttl| ttl.get());
    let pinned = cache(&holder)?
        .pin(prompt.root, &prompt.chain, ttl, flags.replicas)
        .await?;
    let Some((pin_id, blocks)) = pinned else {
        let message = format!("{} holds nothing of this prompt", holder.id);
        return Err(Error::new(ErrorCode::NotFound, message).into());
    };
    if format == Format::Json {
        return output::print_json(&json!({ "node": holder.id, "pin_id": pin_id, "pinned_blocks": blocks }));
    }
    println!(
        "{} keeps {blocks} of {} blocks: unpin with perigee cache unpin --node {} {pin_id}",
        holder.id,
        prompt.chain.len(),
        holder.id
    );
    Ok(())
}

async fn unpin(flags: &UnpinArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let record = find(members, &flags.node)?;
    if !cache(record)?.unpin(flags.pin_id).await? {
        let message = format!("{} has no pin {}", record.id, flags.pin_id);
        return Err(Error::new(ErrorCode::NotFound, message).into());
    }
    if format == Format::Json {
        return output::print_json(&json!({ "node": record.id, "pin_id": flags.pin_id, "unpinned": true }));
    }
    println!("unpinned {} of {}", flags.pin_id, record.id);
    Ok(())
}

async fn pins(members: &[Reached], format: Format) -> anyhow::Result<()> {
    let answers = ask(members, async |record| cache(&record)?.list_pins().await).await;
    let pins = answers
        .iter()
        .flat_map(|(record, pins)| pins.iter().map(move |pin| (record, pin)));
    let last = |pin: &client::PinnedChain| proto::convert::hash("hash", &pin.hash).unwrap_or_default();
    if format == Format::Json {
        let pins = pins.map(|(record, pin)| {
            json!({
                "node": record.id,
                "pin_id": pin.pin_id,
                "hash": last(pin),
                "blocks": pin.blocks,
                "ttl_ms": (pin.ttl_ms > 0).then_some(pin.ttl_ms),
                "replicas_min": pin.replicas_min,
            })
        });
        return output::print_json(&json!({ "pins": pins.collect::<Vec<_>>() }));
    }
    let mut table = output::table(&["NODE", "PIN", "LAST BLOCK", "BLOCKS", "REPLICAS", "ENDS IN"]);
    for (record, pin) in pins {
        table.add_row([
            record.id.to_string(),
            pin.pin_id.to_string(),
            last(pin).to_string(),
            pin.blocks.to_string(),
            pin.replicas_min.to_string(),
            match pin.ttl_ms {
                0 => "-".to_owned(),
                ttl => humantime::format_duration(Duration::from_secs(ttl.div_ceil(1000))).to_string(),
            },
        ]);
    }
    Ok(output::print_table(&table)?)
}

async fn evict(flags: &EvictArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let prompt = match flags.all {
        true => None,
        false => Some(Prompt::read(&flags.prompt, members).await?),
    };
    let members = chosen(members, flags.node.as_deref())?;
    if !flags.yes {
        let names: Vec<&str> = members.iter().map(|record| record.id.as_str()).collect();
        let what = match &prompt {
            None => "every cached block that nobody uses".to_owned(),
            Some(prompt) => format!("{} blocks and what continues them", prompt.chain.len()),
        };
        confirm(&format!("drop {what} on {}", names.join(", ")))?;
    }
    let chain = prompt.as_ref().map(|prompt| &prompt.chain[..]);
    let answers = ask(&members, async |record| cache(&record)?.evict(chain).await).await;
    if format == Format::Json {
        let nodes = answers
            .iter()
            .map(|(record, (evicted, kept))| json!({ "id": record.id, "evicted_blocks": evicted, "kept_blocks": kept }));
        return output::print_json(&json!({ "nodes": nodes.collect::<Vec<_>>() }));
    }
    let mut table = output::table(&["NODE", "EVICTED", "KEPT"]);
    for (record, (evicted, kept)) in &answers {
        table.add_row([record.id.to_string(), evicted.to_string(), kept.to_string()]);
    }
    Ok(output::print_table(&table)?)
}

async fn warm(flags: &WarmArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let prompt = Prompt::read(&flags.prompt, members).await?;
    let to = find(members, &flags.to)?;
    let others: Vec<Reached> = members
        .iter()
        .filter(|record| record.id != to.id)
        .cloned()
        .collect();
    let (from, held) = match &flags.from {
        Some(id) => (find(members, id)?.clone(), prompt.chain.len() as u64),
        None => prompt.holder(&others).await?,
    };
    let wanted = usize::try_from(held)
        .unwrap_or(usize::MAX)
        .min(prompt.chain.len());
    let bar = output::step_bar(&format!("{} -> {}", from.id, to.id));
    let warmed = cache(to)?
        .warm(
            prompt.root,
            &prompt.chain[..wanted],
            &from.grpc_endpoint,
            WARM_TIMEOUT,
        )
        .await;
    bar.finish_and_clear();
    let (held, bytes) = warmed?;
    if format == Format::Json {
        return output::print_json(&json!({
            "from": from.id,
            "to": to.id,
            "held_blocks": held,
            "fetched_bytes": bytes,
        }));
    }
    println!(
        "{} holds {held} of {} blocks, {} fetched from {}",
        to.id,
        prompt.chain.len(),
        output::bytes(bytes),
        from.id
    );
    Ok(())
}

async fn verify(node: Option<&str>, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let members = chosen(members, node)?;
    let bar = output::step_bar("verify");
    let mut nodes: Vec<(String, client::Verification)> = Vec::new();
    for record in &members {
        bar.set_message(record.id.to_string());
        let mut stream = cache(record)?.verify().await?;
        let mut last = client::Verification::default();
        while let Some(part) = stream.next().await? {
            bar.set_length(part.total_blocks);
            bar.set_position(part.verified_blocks);
            last = part;
        }
        nodes.push((record.id.to_string(), last));
    }
    bar.finish_and_clear();
    let corrupt: u64 = nodes.iter().map(|(_, found)| found.corrupt_blocks).sum();
    if format == Format::Json {
        let nodes = nodes.iter().map(|(id, found)| {
            json!({
                "id": id,
                "verified_blocks": found.verified_blocks,
                "corrupt_blocks": found.corrupt_blocks,
                "dropped_blocks": found.dropped_blocks,
            })
        });
        output::print_json(&json!({ "nodes": nodes.collect::<Vec<_>>() }))?;
    } else {
        let mut table = output::table(&["NODE", "VERIFIED", "CORRUPT", "DROPPED"]);
        for (id, found) in &nodes {
            table.add_row([
                id.clone(),
                found.verified_blocks.to_string(),
                found.corrupt_blocks.to_string(),
                found.dropped_blocks.to_string(),
            ]);
        }
        output::print_table(&table)?;
    }
    if corrupt > 0 {
        let message =
            format!("{corrupt} cached blocks were corrupt and are dropped: test the memory of their nodes");
        return Err(Error::new(ErrorCode::Corrupt, message).into());
    }
    Ok(())
}

/// Asks the nodes at once, in their order. Those that do not answer are said on stderr and left out.
async fn ask<T>(
    members: &[Reached],
    question: impl AsyncFn(Reached) -> Result<T, Error>,
) -> Vec<(Reached, T)> {
    let question = &question;
    let answers = stream::iter(members.to_vec()).map(|record| async move {
        let answer = question(record.clone()).await;
        (record, answer)
    });
    let answers: Vec<(Reached, Result<T, Error>)> = answers.buffered(ASKED_MAX).collect().await;
    let mut good = Vec::with_capacity(answers.len());
    for (record, answer) in answers {
        match answer {
            Ok(answer) => good.push((record, answer)),
            Err(error) => eprintln!("perigee: {} does not answer: {error}", record.id),
        }
    }
    good
}

/// A client of the node's cache.
fn cache(record: &Reached) -> Result<Cache, Error> {
    let channel = record.channel()?;
    let root = record.kv_space.as_ref().map(types::KvSpace::root);
    Ok(Cache::new(channel, root.unwrap_or_default()))
}

/// The nodes that have pools.
async fn members(router: &Router) -> anyhow::Result<Vec<Reached>> {
    let status = router.inference()?.cluster_status().await?;
    let records = status.nodes.into_iter().map(|node| node.record);
    let with_pools = records.filter(nodes::has_pool);
    Ok(with_pools.map(|record| router.reached(record)).collect())
}

/// One node, or all of them.
fn chosen(members: &[Reached], id: Option<&str>) -> Result<Vec<Reached>, Error> {
    match id {
        None => Ok(members.to_vec()),
        Some(id) => Ok(vec![find(members, id)?.clone()]),
    }
}

fn find<'a>(members: &'a [Reached], id: &str) -> Result<&'a Reached, Error> {
    members
        .iter()
        .find(|record| record.id.as_str() == id)
        .ok_or_else(|| {
            let known: Vec<&str> = members.iter().map(|record| record.id.as_str()).collect();
            let message = format!(
                "no node with a pool is named {id}; there are: {}",
                known.join(", ")
            );
            Error::new(ErrorCode::NotFound, message)
        })
}

/// Lets a person type `yes` before something is destroyed.
fn confirm(what: &str) -> anyhow::Result<()> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Error::invalid("yes", format!("to {what} without a terminal, give --yes")).into());
    }
    eprint!("{what}? Type yes: ");
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    match answer.trim() {
        "yes" => Ok(()),
        _ => Err(Error::invalid("yes", "not confirmed, nothing was done").into()),
    }
}

/// A number of things that a JSON document says.
fn count_json(imported: u64, held: u64, node: &Reached) -> Value {
    json!({ "node": node.id, "imported_blocks": imported, "held_blocks": held })
}
