//! Blocks in files: `perigee cache export` and `import`.
//!
//! A file describes itself: a line that says what it is, a line of JSON with the space's root, the size of a block, and hash
//! and checksum of each block, then the blocks' bytes. The node that takes it in verifies every block.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::Context;
use client::ExportedChain;
use futures::stream;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use types::{BlockHash, Checksum, Error, ErrorCode};

use super::flags::{ExportArgs, ImportArgs};
use super::prompt::Prompt;
use super::{cache, find, views};
use crate::output::{self, Format};
use crate::reach::Reached;

/// First line of a file. Older programs refuse a format that they do not know.
const MAGIC: &str = "perigee kv blocks 1";
/// A header larger than this is none: a million blocks have some 60 MiB.
const HEADER_BYTES_MAX: u64 = 64 << 20;
/// Bytes that are read and sent at a time.
const PIECE_BYTES: usize = 1 << 20;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    root: BlockHash,
    block_bytes: u64,
    blocks: Vec<Block>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Block {
    hash: BlockHash,
    checksum: Checksum,
}

pub(super) async fn export(
    flags: &ExportArgs,
    prompt: &Prompt,
    members: &[Reached],
    format: Format,
) -> anyhow::Result<()> {
    let holder = match &flags.node {
        Some(id) => find(members, id)?.clone(),
        None => prompt.holder(members).await?.0,
    };
    let (chain, mut data) = cache(&holder)?.export(&prompt.chain).await?;
    let file = OpenOptions::new().write(true).create_new(true).open(&flags.file);
    let file = file.map_err(|error| refused(&flags.file, &error))?;
    let mut file = BufWriter::new(file);
    write_header(&mut file, &chain)?;
    let total = chain.block_bytes * chain.chain.len() as u64;
    let bar = output::byte_bar(&flags.file.display().to_string(), Some(total));
    let mut written = 0;
    while let Some(piece) = data.next().await? {
        file.write_all(&piece)
            .with_context(|| format!("write {}", flags.file.display()))?;
        written += piece.len() as u64;
        bar.set_position(written);
    }
    file.flush()
        .with_context(|| format!("write {}", flags.file.display()))?;
    bar.finish_and_clear();
    if written != total {
        let message = format!("{} sent {written} of {total} bytes", holder.id);
        return Err(Error::unavailable(message).into());
    }
    let blocks = chain.chain.len();
    format.print(&views::exported(&holder.id, &flags.file, blocks, written))
}

pub(super) async fn import(flags: &ImportArgs, members: &[Reached], format: Format) -> anyhow::Result<()> {
    let node = find(members, &flags.node)?;
    let file = File::open(&flags.file).map_err(|error| refused(&flags.file, &error))?;
    let mut file = BufReader::new(file);
    let chain = read_header(&mut file, &flags.file)?;
    let total = chain.block_bytes * chain.chain.len() as u64;
    let bar = output::byte_bar(&flags.file.display().to_string(), Some(total));
    let pieces = stream::unfold((file, bar.clone()), next_piece);
    let imported = cache(node)?.import(&chain, pieces).await;
    bar.finish_and_clear();
    let (imported, held) = imported?;
    format.print(&views::imported(&node.id, imported, held))
}

/// A file that cannot be read any further ends the stream: the node then says how much is missing.
async fn next_piece(
    (mut file, bar): (BufReader<File>, ProgressBar),
) -> Option<(Vec<u8>, (BufReader<File>, ProgressBar))> {
    let mut piece = vec![0; PIECE_BYTES];
    let read = file.read(&mut piece).ok().filter(|read| *read > 0)?;
    piece.truncate(read);
    bar.inc(read as u64);
    Some((piece, (file, bar)))
}

fn write_header(file: &mut impl Write, chain: &ExportedChain) -> anyhow::Result<()> {
    let blocks = chain.chain.iter().zip(&chain.checksums);
    let header = Header {
        root: chain.root,
        block_bytes: chain.block_bytes,
        blocks: blocks
            .map(|(hash, checksum)| Block {
                hash: *hash,
                checksum: *checksum,
            })
            .collect(),
    };
    writeln!(file, "{MAGIC}")?;
    serde_json::to_writer(&mut *file, &header)?;
    writeln!(file)?;
    Ok(())
}

fn read_header(file: &mut impl BufRead, path: &Path) -> Result<ExportedChain, Error> {
    let wrong = |what: &str| Error::invalid("file", format!("{} {what}", path.display()));
    let mut line = |bytes_max: u64| {
        let mut line = Vec::new();
        let read = file.by_ref().take(bytes_max).read_until(b'\n', &mut line);
        read.ok().filter(|_| line.pop() == Some(b'\n')).map(|_| line)
    };
    if line(MAGIC.len() as u64 + 1).as_deref() != Some(MAGIC.as_bytes()) {
        return Err(wrong("is no file of KV blocks that this version knows"));
    }
    let header = line(HEADER_BYTES_MAX).ok_or_else(|| wrong("ends in its header"))?;
    let header: Header = serde_json::from_slice(&header)
        .map_err(|error| wrong(&format!("has a header that cannot be read: {error}")))?;
    Ok(ExportedChain {
        root: header.root,
        block_bytes: header.block_bytes,
        chain: header.blocks.iter().map(|block| block.hash).collect(),
        checksums: header.blocks.iter().map(|block| block.checksum).collect(),
    })
}

/// What a file that cannot be opened is for the caller.
pub(crate) fn refused(path: &Path, error: &std::io::Error) -> Error {
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => ErrorCode::NotFound,
        std::io::ErrorKind::AlreadyExists => ErrorCode::Conflict,
        std::io::ErrorKind::PermissionDenied => ErrorCode::Denied,
        _ => ErrorCode::Internal,
    };
    Error::new(code, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain() -> ExportedChain {
        ExportedChain {
            root: BlockHash([7; 16]),
            block_bytes: 512,
            chain: vec![BlockHash([1; 16]), BlockHash([2; 16])],
            checksums: vec![Checksum(u64::MAX), Checksum(3)],
        }
    }

    #[test]
    fn a_header_comes_back_as_it_went() {
        let mut file = Vec::new();
        write_header(&mut file, &chain()).expect("memory");
        file.extend([0xff; 1024]);
        let mut rest = &file[..];
        assert_eq!(read_header(&mut rest, Path::new("f")), Ok(chain()));
        assert_eq!(rest.len(), 1024, "the bytes begin after it");
    }

    #[test]
    fn another_file_is_refused_by_name() {
        for bytes in [
            "",
            "hello\n",
            "perigee kv blocks 2\n{}\n",
            "perigee kv blocks 1\n{",
            "perigee kv blocks 1\n{}\n",
        ] {
            let error = read_header(&mut bytes.as_bytes(), Path::new("some.kv")).expect_err(bytes);
            assert_eq!(error.code, ErrorCode::Invalid);
            assert!(error.message.starts_with("some.kv "), "{error}");
        }
    }
}
