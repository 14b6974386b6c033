//! A node's blocks, for people: what is there, what is kept, what goes, and what leaves as a file.

use std::time::Duration;

use futures::Stream;
use node::Channel;
use proto::v1::cache_client::CacheClient;
use proto::{convert, v1};
use tokio::time::Instant;
use tonic::Streaming;
use types::{BlockHash, Checksum, Error};

use crate::call::{self, UNARY_DEADLINE};

/// How long the next part of a verification or an export may take: some MiB of memory are read for it.
const PART_DEADLINE: Duration = Duration::from_secs(30);
/// Longest import: a pool of 64 GiB over 1 Gbit/s.
const IMPORT_DEADLINE: Duration = Duration::from_secs(600);

/// Client of `perigee.v1.Cache`. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Cache {
    client: CacheClient<Channel>,
    kv_root: BlockHash,
    deadline: Duration,
}

/// What a node holds of a chain.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Located {
    /// Leading blocks that are held.
    pub held_blocks: u64,
    /// Of these, blocks that are in use.
    pub used_blocks: u64,
    /// What the last held one is worth to the node.
    pub worth: f32,
}

/// A block by its worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankedBlock {
    /// Identity of the content.
    pub hash: BlockHash,
    /// Its place in its chain, from 1.
    pub depth: u64,
    /// What holds it.
    pub pins: u64,
    /// Blocks that continue it.
    pub children: u64,
    /// Higher is better.
    pub worth: f32,
}

/// A pin, as `perigee.v1.PinnedChain` documents it.
pub type PinnedChain = v1::PinnedChain;

/// How far a verification is, as `perigee.v1.VerifyResponse` documents it.
pub type Verification = v1::VerifyResponse;

/// What describes exported blocks: enough to verify them without their node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedChain {
    /// Root of the chain's space.
    pub root: BlockHash,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// The blocks, first one first.
    pub chain: Vec<BlockHash>,
    /// Checksum of each.
    pub checksums: Vec<Checksum>,
}

impl Cache {
    /// Calls over `channel`, to a node whose blocks are of the space with this root.
    pub fn new(channel: Channel, kv_root: BlockHash) -> Self {
        let client = CacheClient::new(channel);
        Self {
            client: client
                .max_decoding_message_size(proto::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(proto::MESSAGE_BYTES_MAX),
            kv_root,
            deadline: UNARY_DEADLINE,
        }
    }

    /// Gives unary calls, and the opening of streams, another deadline.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Which of the blocks the node holds.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space; the node cannot be reached, or answers for other blocks.
    pub async fn exists(&self, hashes: &[BlockHash]) -> Result<Vec<bool>, Error> {
        const METHOD: &str = "Cache/Exists";
        let mut client = self.client.clone();
        let request = v1::ExistsRequest {
            kv_root: self.kv_root(),
            hashes: Some(convert::chain_to_wire(hashes)),
        };
        let request = call::request(request, self.deadline);
        let answer = call::unary(METHOD, self.deadline, client.exists(request)).await?;
        if answer.held.len() != hashes.len() {
            return Err(Error::internal(format!(
                "{METHOD}: the peer answers for {} blocks, but {} were asked for",
                answer.held.len(),
                hashes.len()
            )));
        }
        Ok(answer.held.iter().map(|held| *held == 1).collect())
    }

    /// What the node holds of a chain.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space; the node cannot be reached.
    pub async fn locate(&self, chain: &[BlockHash]) -> Result<Located, Error> {
        let mut client = self.client.clone();
        let request = v1::LocateRequest {
            kv_root: self.kv_root(),
            chain: Some(convert::chain_to_wire(chain)),
        };
        let request = call::request(request, self.deadline);
        let answer = call::unary("Cache/Locate", self.deadline, client.locate(request)).await?;
        Ok(Located {
            held_blocks: answer.held_blocks,
            used_blocks: answer.used_blocks,
            worth: answer.worth,
        })
    }

    /// The blocks that the node values most, or least, in that order.
    ///
    /// # Errors
    ///
    /// The node cannot be reached, or what it says cannot be read.
    pub async fn top(&self, count: u64, coldest: bool) -> Result<Vec<RankedBlock>, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::TopRequest { count, coldest }, self.deadline);
        let answer = call::unary("Cache/Top", self.deadline, client.top(request)).await?;
        let blocks = answer.blocks.iter().map(|block| {
            Ok(RankedBlock {
                hash: convert::hash("hash", &block.hash)?,
                depth: block.depth,
                pins: block.pins,
                children: block.children,
                worth: block.worth,
            })
        });
        blocks.collect()
    }

    /// Keeps what the node holds of a chain, for `ttl` or until it is unpinned, on `replicas_min` nodes. Gives the pin and its
    /// blocks; `None` if nothing of the chain is held.
    ///
    /// # Errors
    ///
    /// `invalid` if the node's pins hold as much as they may; `conflict`; the node cannot be reached.
    pub async fn pin(
        &self,
        root: BlockHash,
        chain: &[BlockHash],
        ttl: Option<Duration>,
        replicas_min: u64,
    ) -> Result<Option<(u64, u64)>, Error> {
        let mut client = self.client.clone();
        let request = v1::PinRequest {
            kv_root: self.kv_root(),
            chain: Some(convert::chain_to_wire(chain)),
            ttl_ms: ttl.map_or(0, |ttl| millis(ttl).max(1)),
            replicas_min,
            root: root.0.to_vec(),
        };
        let request = call::request(request, self.deadline);
        let answer = call::unary("Cache/Pin", self.deadline, client.pin(request)).await?;
        Ok((answer.pinned_blocks > 0).then_some((answer.pin_id, answer.pinned_blocks)))
    }

    /// Ends a pin. False if there is none of this id.
    ///
    /// # Errors
    ///
    /// The node cannot be reached.
    pub async fn unpin(&self, pin_id: u64) -> Result<bool, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::UnpinRequest { pin_id }, self.deadline);
        let answer = call::unary("Cache/Unpin", self.deadline, client.unpin(request)).await?;
        Ok(answer.held)
    }

    /// The node's pins.
    ///
    /// # Errors
    ///
    /// The node cannot be reached.
    pub async fn list_pins(&self) -> Result<Vec<PinnedChain>, Error> {
        let mut client = self.client.clone();
        let request = call::request(v1::ListPinsRequest {}, self.deadline);
        let answer = call::unary("Cache/ListPins", self.deadline, client.list_pins(request)).await?;
        Ok(answer.pins)
    }

    /// Drops what continues a chain, and of the chain what no other one shares; or everything, where there is no chain. As far as
    /// nobody uses it. Gives the blocks that went and those that stayed.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space; the node cannot be reached.
    pub async fn evict(&self, chain: Option<&[BlockHash]>) -> Result<(u64, u64), Error> {
        let mut client = self.client.clone();
        let request = v1::EvictRequest {
            kv_root: self.kv_root(),
            all: chain.is_none(),
            chain: chain.map(convert::chain_to_wire),
        };
        let request = call::request(request, self.deadline);
        let answer = call::unary("Cache/Evict", self.deadline, client.evict(request)).await?;
        Ok((answer.evicted_blocks, answer.kept_blocks))
    }

    /// Lets the node fetch what it lacks of a chain from another one. Gives the leading blocks that it then holds, and the
    /// bytes it fetched.
    ///
    /// # Errors
    ///
    /// `conflict` if the node is of another KV space; the node cannot be reached, or needs longer than `within`.
    pub async fn warm(
        &self,
        root: BlockHash,
        chain: &[BlockHash],
        source_grpc_endpoint: &str,
        within: Duration,
    ) -> Result<(u64, u64), Error> {
        let mut client = self.client.clone();
        let request = v1::WarmRequest {
            kv_root: self.kv_root(),
            root: root.0.to_vec(),
            chain: Some(convert::chain_to_wire(chain)),
            source_grpc_endpoint: source_grpc_endpoint.to_owned(),
            timeout_ms: millis(within),
        };
        let deadline = within + self.deadline;
        let request = call::request(request, deadline);
        let answer = call::unary("Cache/Warm", deadline, client.warm(request)).await?;
        Ok((answer.held_blocks, answer.fetched_bytes))
    }

    /// Verifies every block that the node holds.
    ///
    /// # Errors
    ///
    /// `overloaded` if the node is busy with as much; the node cannot be reached.
    pub async fn verify(&self) -> Result<VerifyStream, Error> {
        let mut client = self.client.clone();
        let opening = client.verify(v1::VerifyRequest {});
        let stream = call::unary(VerifyStream::METHOD, self.deadline, opening).await?;
        Ok(VerifyStream { stream })
    }

    /// The held part of a chain, with its bytes.
    ///
    /// # Errors
    ///
    /// `not_found` if nothing of it is held; `overloaded`; `conflict`; the node cannot be reached.
    pub async fn export(&self, chain: &[BlockHash]) -> Result<(ExportedChain, ExportStream), Error> {
        let mut client = self.client.clone();
        let request = v1::ExportRequest {
            kv_root: self.kv_root(),
            chain: Some(convert::chain_to_wire(chain)),
        };
        let stream = call::unary(ExportStream::METHOD, self.deadline, client.export(request)).await?;
        let mut stream = ExportStream { stream };
        match stream.part().await? {
            Some(v1::export_response::Part::Header(header)) => Ok((exported(&header, chain.len())?, stream)),
            Some(v1::export_response::Part::Data(_)) | None => Err(call::empty(ExportStream::METHOD)),
        }
    }

    /// Puts exported blocks into the node, which verifies them. `data` are the bytes of the blocks, in pieces of any size.
    /// Gives the blocks that were new, and those that the node held already.
    ///
    /// # Errors
    ///
    /// `corrupt` if a block is not what it was; `invalid` if the file does not fit the node's blocks; `overloaded` if the pool
    /// has no room; `conflict`; the node cannot be reached.
    pub async fn import(
        &self,
        file: &ExportedChain,
        data: impl Stream<Item = Vec<u8>> + Send + 'static,
    ) -> Result<(u64, u64), Error> {
        use futures::StreamExt;
        use v1::import_request::Part;
        let header = v1::ImportHeader {
            kv_root: self.kv_root(),
            file: Some(v1::ExportHeader {
                root: file.root.0.to_vec(),
                block_bytes: file.block_bytes,
                chain: Some(convert::chain_to_wire(&file.chain)),
                checksums: file.checksums.iter().map(|checksum| checksum.0).collect(),
            }),
        };
        let header = futures::stream::iter([Part::Header(header)]);
        let parts = header
            .chain(data.map(Part::Data))
            .map(|part| v1::ImportRequest { part: Some(part) });
        let mut client = self.client.clone();
        let request = call::request(parts, IMPORT_DEADLINE);
        let answer = call::unary("Cache/Import", IMPORT_DEADLINE, client.import(request)).await?;
        Ok((answer.imported_blocks, answer.held_blocks))
    }

    fn kv_root(&self) -> Vec<u8> {
        self.kv_root.0.to_vec()
    }
}

/// A verification that runs.
#[derive(Debug)]
pub struct VerifyStream {
    stream: Streaming<v1::VerifyResponse>,
}

impl VerifyStream {
    const METHOD: &str = "Cache/Verify";

    /// How far it is; `None` at its end.
    ///
    /// # Errors
    ///
    /// The connection broke, or the node says nothing for too long.
    pub async fn next(&mut self) -> Result<Option<Verification>, Error> {
        call::next(
            Self::METHOD,
            &mut self.stream,
            Some(Instant::now() + PART_DEADLINE),
        )
        .await
    }
}

/// The bytes of exported blocks.
#[derive(Debug)]
pub struct ExportStream {
    stream: Streaming<v1::ExportResponse>,
}

impl ExportStream {
    const METHOD: &str = "Cache/Export";

    /// The next piece; `None` at the end.
    ///
    /// # Errors
    ///
    /// The connection broke, or the node says nothing for too long.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Error> {
        match self.part().await? {
            None => Ok(None),
            Some(v1::export_response::Part::Data(bytes)) => Ok(Some(bytes)),
            Some(v1::export_response::Part::Header(_)) => Err(Error::internal(format!(
                "{}: the peer sent a second header",
                Self::METHOD
            ))),
        }
    }

    async fn part(&mut self) -> Result<Option<v1::export_response::Part>, Error> {
        let until = Some(Instant::now() + PART_DEADLINE);
        match call::next(Self::METHOD, &mut self.stream, until).await? {
            None => Ok(None),
            Some(message) => message.part.map(Some).ok_or_else(|| call::empty(Self::METHOD)),
        }
    }
}

fn exported(header: &v1::ExportHeader, blocks_max: usize) -> Result<ExportedChain, Error> {
    let chain = convert::chain("chain", header.chain.as_ref(), blocks_max)?;
    if header.checksums.len() != chain.len() {
        return Err(Error::internal(format!(
            "{}: {} checksums for {} blocks",
            ExportStream::METHOD,
            header.checksums.len(),
            chain.len()
        )));
    }
    Ok(ExportedChain {
        root: convert::hash("root", &header.root)?,
        block_bytes: header.block_bytes,
        chain,
        checksums: header.checksums.iter().copied().map(Checksum).collect(),
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
