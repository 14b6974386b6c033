//! Prefixes that go to a bucket and come back, and what happens when the bucket is not well.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use types::BlockHash;

use super::*;
use crate::Config;
use crate::fetch::{Fetch, FetchOutcome, fetch_prefix};
use crate::object::Bounds;
use crate::object::segment::Grid;
use crate::sequence::SequenceBlocks;
use crate::table::Purpose;
use crate::testing::{
    BLOCK_TOKENS, assert_content, channels, compute, eventually, lonely_store, read, space, tokens, write,
};

/// What happens to an object in the bucket.
type Change = Box<dyn Fn(&mut Vec<u8>)>;

/// Tokens of one segment.
const SEGMENT: usize = 16 * BLOCK_TOKENS;

/// A bucket that can fail and fall silent, and counts what it is asked.
#[derive(Debug, Default)]
struct Bucket {
    objects: InMemory,
    fails: AtomicBool,
    is_silent: AtomicBool,
    gets: AtomicUsize,
    puts: AtomicUsize,
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a bucket")
    }
}

impl Bucket {
    async fn suffer(&self) -> object_store::Result<()> {
        if self.is_silent.load(Relaxed) {
            std::future::pending::<()>().await;
        }
        if self.fails.load(Relaxed) {
            return Err(object_store::Error::Generic {
                store: "test",
                source: "out of order".into(),
            });
        }
        Ok(())
    }

    async fn names(&self) -> Vec<Path> {
        let mut names: Vec<Path> = self
            .objects
            .list(None)
            .map(|found| found.unwrap().location)
            .collect()
            .await;
        names.sort();
        names
    }

    /// Changes what is stored under a name.
    async fn change(&self, name: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let found = self.objects.get(name).await.unwrap().bytes().await.unwrap();
        let mut bytes = found.to_vec();
        change(&mut bytes);
        self.objects.put(name, bytes.into()).await.unwrap();
    }
}

#[tonic::async_trait]
impl ObjectStore for Bucket {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.puts.fetch_add(1, Relaxed);
        self.suffer().await?;
        self.objects.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.objects.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.gets.fetch_add(1, Relaxed);
        self.suffer().await?;
        self.objects.get_opts(path, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.objects.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.objects.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.objects.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.objects.copy_opts(from, to, options).await
    }
}

/// A node over the bucket.
fn node_with(bucket: &Arc<Bucket>, blocks: usize, bounds: Bounds) -> Store {
    let store = lonely_store(blocks, Config::default());
    let grid = Grid::new(store.common_root(), space().layout.block_bytes());
    store.mount_objects(Objects::on(bucket.clone(), "kv", true, bounds, grid));
    store
}

fn node(bucket: &Arc<Bucket>) -> Store {
    node_with(bucket, 256, Bounds::default())
}

/// Computes the tokens, finds them again, and writes what that makes worth it.
async fn keep(store: &Store, tenant: &str, tokens: &[u32]) {
    drop(compute(store, tenant, tokens));
    drop(SequenceBlocks::begin(store, tenant, tokens));
    write_waiting(store, store.objects().unwrap()).await;
}

/// Asks for a prompt that the node may hold a part of, as a request does.
async fn ask(store: &Store, tenant: &str, tokens: &[u32]) -> (Vec<BlockHash>, FetchOutcome) {
    let (root, chain) = store.chain(tenant, tokens);
    let held = store.lookup_len(&chain);
    let fetch = Fetch {
        purpose: Purpose::Request,
        root,
        chain: &chain,
        from: 0,
        sources: &[],
        deadline: Instant::now() + Duration::from_secs(10),
    };
    let outcome = fetch_prefix(store, &channels(), fetch).await;
    assert_eq!(outcome.blocks.len(), held + outcome.from_objects);
    assert_content(store, &outcome.blocks, &chain[..outcome.blocks.len()]);
    (chain, outcome)
}

#[tokio::test]
async fn a_node_that_never_had_a_prefix_finds_it_in_the_bucket() {
    let bucket = Arc::new(Bucket::default());
    let prompt = tokens(1, 3 * SEGMENT + 20);
    keep(&node(&bucket), "", &prompt).await;
    assert_eq!(bucket.names().await.len(), 3, "what fills no segment stays out");
    let other = node(&bucket);
    let (chain, outcome) = ask(&other, "", &prompt).await;
    assert_eq!(outcome.from_objects, 48);
    drop(outcome);
    // As much reuse as if the node had computed it, and the bucket is not asked again.
    assert_eq!(
        SequenceBlocks::begin(&other, "", &prompt).cached_tokens(),
        3 * SEGMENT
    );
    assert_eq!(other.lookup_len(&chain), 48);
    assert_eq!(other.object_stats().unwrap().read_bytes, 48 * 512);
}

#[tokio::test]
async fn only_what_came_back_or_is_pinned_is_written_and_only_once() {
    let bucket = Arc::new(Bucket::default());
    let store = node(&bucket);
    let objects = store.objects().unwrap();
    let (once, pinned) = (tokens(1, SEGMENT), tokens(2, SEGMENT));
    drop(compute(&store, "", &once));
    write_waiting(&store, objects).await;
    assert_eq!(bucket.names().await.len(), 0);
    drop(compute(&store, "", &pinned));
    store.note_wanted(&store.chain("", &pinned).1);
    write_waiting(&store, objects).await;
    assert_eq!(bucket.names().await.len(), 1);
    for _ in 0..3 {
        keep(&store, "", &once).await;
        keep(&store, "", &pinned).await;
    }
    assert_eq!(bucket.puts.load(Relaxed), 2);
    // Another node that comes to the same conclusion sees that it is there.
    keep(&node(&bucket), "", &once).await;
    assert_eq!(bucket.puts.load(Relaxed), 2);
}

#[tokio::test]
async fn tenants_share_a_bucket_and_nothing_else() {
    let bucket = Arc::new(Bucket::default());
    let prompt = tokens(1, SEGMENT);
    keep(&node(&bucket), "a", &prompt).await;
    let other = node(&bucket);
    assert_eq!(ask(&other, "b", &prompt).await.1.from_objects, 0);
    assert_eq!(ask(&other, "", &prompt).await.1.from_objects, 0);
    assert_eq!(ask(&other, "a", &prompt).await.1.from_objects, 16);
}

#[tokio::test]
async fn a_prompt_goes_on_from_the_middle_of_a_segment() {
    let bucket = Arc::new(Bucket::default());
    let prompt = tokens(1, 2 * SEGMENT);
    keep(&node(&bucket), "", &prompt).await;
    let other = node(&bucket);
    drop(compute(&other, "", &prompt[..5 * BLOCK_TOKENS]));
    let (_, outcome) = ask(&other, "", &prompt).await;
    assert_eq!(outcome.from_objects, 27);
}

#[tokio::test]
async fn a_prompt_that_is_not_there_costs_one_request() {
    let bucket = Arc::new(Bucket::default());
    let store = node(&bucket);
    for _ in 0..5 {
        assert_eq!(ask(&store, "", &tokens(1, 10 * SEGMENT)).await.1.from_objects, 0);
    }
    assert_eq!(bucket.gets.load(Relaxed), 1);
    ask(&store, "", &tokens(2, SEGMENT - 1)).await;
    assert_eq!(
        bucket.gets.load(Relaxed),
        1,
        "less than a segment is not asked for"
    );
}

#[tokio::test]
async fn what_a_bucket_changed_is_never_believed_and_is_replaced_at_its_next_use() {
    let grid = node(&Arc::default()).objects().unwrap().grid();
    let bytes = grid.object_bytes() as usize;
    let header = grid.header_bytes();
    // Magic, version, space, a hash, the header's checksum, the first and the last block; cut off, too long.
    let changes: Vec<(usize, Change)> = [0, 8, 30, 41, header - 1, header, bytes - 1]
        .into_iter()
        .map(|at| {
            (
                at,
                Box::new(move |object: &mut Vec<u8>| object[at] ^= 0x10) as Change,
            )
        })
        .chain([
            (0, Box::new(|object: &mut Vec<u8>| object.truncate(100)) as Change),
            (0, Box::new(|object: &mut Vec<u8>| object.push(0)) as Change),
        ])
        .collect();
    for (at, change) in changes {
        let bucket = Arc::new(Bucket::default());
        let prompt = tokens(1, SEGMENT);
        keep(&node(&bucket), "", &prompt).await;
        let name = bucket.names().await.pop().unwrap();
        bucket.change(&name, change).await;

        let other = node(&bucket);
        let (_, outcome) = ask(&other, "", &prompt).await;
        let whole = at.saturating_sub(header) / 512;
        assert_eq!(outcome.from_objects, whole, "blocks before byte {at}");
        drop(outcome);
        assert_eq!(other.object_stats().unwrap().corruptions, 1);
        // It is computed instead, and the next use puts it right for everybody.
        keep(&other, "", &prompt).await;
        assert_eq!(ask(&node(&bucket), "", &prompt).await.1.from_objects, 16);
    }
}

#[tokio::test]
async fn an_object_under_another_name_is_refused() {
    let bucket = Arc::new(Bucket::default());
    let store = node(&bucket);
    let (one, two) = (tokens(1, SEGMENT), tokens(2, SEGMENT));
    keep(&store, "", &one).await;
    let first = bucket.names().await.pop().unwrap();
    keep(&store, "", &two).await;
    let second = bucket
        .names()
        .await
        .into_iter()
        .find(|name| *name != first)
        .unwrap();
    bucket.objects.copy(&first, &second).await.unwrap();
    let other = node(&bucket);
    assert_eq!(ask(&other, "", &two).await.1.from_objects, 0);
    assert_eq!(other.object_stats().unwrap().corruptions, 1);
}

#[tokio::test]
async fn rot_in_memory_does_not_reach_the_bucket() {
    let bucket = Arc::new(Bucket::default());
    let store = node(&bucket);
    let prompt = tokens(1, SEGMENT);
    let blocks = compute(&store, "", &prompt).block_ids().to_vec();
    let mut bytes = read(&store, blocks[7]);
    bytes[100] ^= 1;
    write(&store, blocks[7], &bytes);
    drop(SequenceBlocks::begin(&store, "", &prompt));
    write_waiting(&store, store.objects().unwrap()).await;
    assert_eq!(bucket.names().await.len(), 0);
}

#[tokio::test]
async fn a_failing_bucket_is_passed_over_and_found_again() {
    let bucket = Arc::new(Bucket::default());
    let bounds = Bounds {
        bypass_min: Duration::from_millis(50),
        ..Bounds::default()
    };
    keep(&node(&bucket), "", &tokens(1, SEGMENT)).await;
    let store = node_with(&bucket, 256, bounds);
    let objects = store.objects().unwrap();
    bucket.fails.store(true, Relaxed);
    let before = bucket.gets.load(Relaxed);
    for seed in 0..20 {
        assert_eq!(ask(&store, "", &tokens(seed, SEGMENT)).await.1.from_objects, 0);
    }
    assert_eq!(
        bucket.gets.load(Relaxed) - before,
        3,
        "as many as it takes to notice"
    );
    assert!(!objects.is_usable());
    assert_eq!(store.object_stats().unwrap().errors, 3);
    bucket.fails.store(false, Relaxed);
    eventually("the bucket is in use again", || {
        objects.check();
        objects.is_usable()
    })
    .await;
    assert_eq!(ask(&store, "", &tokens(1, SEGMENT)).await.1.from_objects, 16);
}

#[tokio::test(start_paused = true)]
async fn a_silent_bucket_costs_time_within_its_bound_and_then_none() {
    let bucket = Arc::new(Bucket::default());
    let prompt = tokens(1, SEGMENT);
    keep(&node(&bucket), "", &prompt).await;
    let store = node(&bucket);
    bucket.is_silent.store(true, Relaxed);
    let timeout = Bounds::default().timeout;
    for attempt in 0..5 {
        let begun = Instant::now();
        assert_eq!(ask(&store, "", &prompt).await.1.from_objects, 0);
        let waited = begun.elapsed();
        assert!(waited <= timeout + Duration::from_millis(10), "{waited:?}");
        assert!(attempt < 3 || waited.is_zero(), "it is known to be silent");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!store.objects().unwrap().is_usable());
    bucket.is_silent.store(false, Relaxed);
    tokio::time::sleep(Bounds::default().bypass_min).await;
    store.objects().unwrap().check();
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(ask(&store, "", &prompt).await.1.from_objects, 16);
}

#[tokio::test]
async fn a_full_pool_takes_what_it_can_hold() {
    let bucket = Arc::new(Bucket::default());
    let prompt = tokens(1, 4 * SEGMENT);
    keep(&node(&bucket), "", &prompt).await;
    let small = node_with(&bucket, 20, Bounds::default());
    let (_, outcome) = ask(&small, "", &prompt).await;
    assert_eq!(outcome.from_objects, 20);
    drop(outcome);
    assert_eq!(small.stats().blocks.owned, 0);
}

#[tokio::test(start_paused = true)]
async fn writes_keep_to_their_rate() {
    let bucket = Arc::new(Bucket::default());
    let bytes = node(&bucket).objects().unwrap().grid().object_bytes();
    let bounds = Bounds {
        write_rate_max: bytes,
        ..Bounds::default()
    };
    let store = node_with(&bucket, 256, bounds);
    let begun = Instant::now();
    keep(&store, "", &tokens(1, 5 * SEGMENT)).await;
    assert_eq!(bucket.names().await.len(), 5);
    // The first one goes at once.
    assert_eq!(begun.elapsed().as_millis() / 100, 40);
}

#[tokio::test]
async fn the_path_names_space_and_segment() {
    let bucket = Arc::new(Bucket::default());
    let store = node(&bucket);
    let prompt = tokens(1, SEGMENT);
    keep(&store, "", &prompt).await;
    let last = store.chain("", &prompt).1[15].to_string();
    let expected = format!("kv/{}/{}/{last}", store.common_root(), &last[..2]);
    assert_eq!(bucket.names().await, [Path::from(expected)]);
    let object: Bytes = bucket
        .objects
        .get(&bucket.names().await[0])
        .await
        .unwrap()
        .bytes()
        .await
        .unwrap();
    assert_eq!(&object[..8], b"PERIGEES");
}
