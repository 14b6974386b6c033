//! `perigee cache`: the cached blocks of all nodes.
//!
//! A prompt is named by its text, its tokens or its block hashes (`prompt.rs`). What a command asks of several nodes it asks at
//! once; a node that does not answer is said on stderr, and the others' answers still count.

mod file;
mod flags;
mod prompt;
mod views;

use std::io::{BufRead, IsTerminal};
use std::time::Duration;

use client::{Cache, Store, StoreStats};
use futures::{StreamExt, stream};
use types::{Error, ErrorCode, NodeId};

use crate::nodes;
use crate::output::{self, Format, Watch};
use crate::reach::{Reached, Router};
pub(crate) use file::refused;
pub(crate) use flags::CacheCommand;
use flags::{EvictArgs, PinArgs, TopArgs, UnpinArgs, WarmArgs};
use prompt::Prompt;
pub(crate) use views::stats as stats_view;

/// Nodes that are asked at a time.
const ASKED_MAX: usize = 32;
/// Longest wait for a node that fetches a prefix.
const WARM_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs one of the commands.
pub(crate) async fn run(command: CacheCommand, router: &Router, format: Format) -> anyhow::Result<()> {
    let members = members(router).await?;
    match command {
        CacheCommand::Stats(watch) => stats(watch, &members, format).await,
        CacheCommand::Top(flags) => top(&flags, &members, format).await,
        CacheCommand::Locate(flags) => locate(&Prompt::read(&flags, &members).await?, &members, format).await,
        CacheCommand::Pin(flags) => pin(&flags, &members, format).await,
        CacheCommand::Unpin(flags) => unpin(&flags, &members, format).await,
        CacheCommand::Pins(watch) => pins(watch, &members, format).await,
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

async fn stats(watch: Watch, members: &[Reached], format: Format) -> anyhow::Result<()> {
    watch
        .show(format, async || Ok(views::stats(&store_stats(members).await)))
        .await
}

/// What each node says of its pool.
pub(crate) async fn store_stats(members: &[Reached]) -> Vec<(Reached, StoreStats)> {
    ask(members, async |record| {
        Store::new(record.channel()?).stats().await
    })
    .await
}

async fn top(flags: &TopArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let members = chosen(members, flags.node.as_deref())?;
    let (count, coldest) = (flags.count, flags.coldest);
    let look = async || {
        let answers = ask(&members, async |record| cache(&record)?.top(count, coldest).await).await;
        let mut blocks: Vec<_> = answers
            .iter()
            .flat_map(|(record, blocks)| blocks.iter().map(move |block| (&record.id, block)))
            .collect();
        blocks.sort_by(|(_, a), (_, b)| {
            let order = b.worth.total_cmp(&a.worth);
            if coldest { order.reverse() } else { order }
        });
        blocks.truncate(usize::try_from(count).unwrap_or(usize::MAX));
        Ok(views::top(&blocks))
    };
    flags.watch.show(format, look).await
}

async fn locate(prompt: &Prompt, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let answers = ask(members, async |record| {
        cache(&record)?.locate(&prompt.chain).await
    })
    .await;
    format.print(&views::locate(prompt, &by_id(&answers)))
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
    format.print(&views::pinned(&holder.id, pin_id, blocks, prompt.chain.len()))
}

async fn unpin(flags: &UnpinArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let record = find(members, &flags.node)?;
    if !cache(record)?.unpin(flags.pin_id).await? {
        let message = format!("{} has no pin {}", record.id, flags.pin_id);
        return Err(Error::new(ErrorCode::NotFound, message).into());
    }
    format.print(&views::unpinned(&record.id, flags.pin_id))
}

async fn pins(watch: Watch, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let look = async || {
        let answers = ask(members, async |record| cache(&record)?.list_pins().await).await;
        Ok(views::pins(&by_id(&answers)))
    };
    watch.show(format, look).await
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
    format.print(&views::evicted(&by_id(&answers)))
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
    format.print(&views::warmed(
        (&from.id, &to.id),
        held,
        prompt.chain.len(),
        bytes,
    ))
}

async fn verify(node: Option<&str>, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let members = chosen(members, node)?;
    let bar = output::step_bar("verify");
    let mut nodes: Vec<(NodeId, client::Verification)> = Vec::new();
    for record in &members {
        bar.set_message(record.id.to_string());
        let mut stream = cache(record)?.verify().await?;
        let mut last = client::Verification::default();
        while let Some(part) = stream.next().await? {
            bar.set_length(part.total_blocks);
            bar.set_position(part.verified_blocks);
            last = part;
        }
        nodes.push((record.id.clone(), last));
    }
    bar.finish_and_clear();
    let corrupt: u64 = nodes.iter().map(|(_, found)| found.corrupt_blocks).sum();
    format.print(&views::verified(&nodes))?;
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

/// What the nodes said, by their names.
fn by_id<T>(answers: &[(Reached, T)]) -> Vec<(&NodeId, &T)> {
    answers.iter().map(|(record, said)| (&record.id, said)).collect()
}

/// A client of the node's cache.
fn cache(record: &Reached) -> Result<Cache, Error> {
    let channel = record.channel()?;
    let root = record.kv_space.as_ref().map(types::KvSpace::root);
    Ok(Cache::new(channel, root.unwrap_or_default()))
}

/// The nodes that have pools.
pub(crate) async fn members(router: &Router) -> anyhow::Result<Vec<Reached>> {
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
