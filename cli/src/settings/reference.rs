//! The reference of all settings, as Markdown.

use std::fmt::Write;

use toml::Value;

use super::Settings;

/// What each setting does. Tested to name every setting, and no other.
const DESCRIPTIONS: &[(&str, &[(&str, &str)])] = &[
    (
        "node",
        &[
            (
                "id",
                "Name in the cluster; empty makes one of the role and the host's name.",
            ),
            ("listen", "IP address to listen on."),
            (
                "advertise",
                "Host under which others reach this node; empty is `listen`.",
            ),
            ("grpc_port", "Port of gRPC; 0 takes a free one."),
            (
                "http_port",
                "Port of HTTP (OpenAI API on a router, metrics, health); 0 takes a free one.",
            ),
            (
                "transfer_port",
                "Port on which peers write and read KV; 0 takes a free one.",
            ),
            (
                "drain_deadline",
                "How long running requests may go on after the process was told to end.",
            ),
        ],
    ),
    (
        "registry",
        &[
            (
                "url",
                "Where members are found: `etcd://HOST:PORT[,HOST:PORT…]` or `perigee://HOST:PORT`.",
            ),
            ("cluster", "Name of the cluster; several may share one etcd."),
            ("lease_ttl", "How long a node that died stays a member."),
            ("connect_deadline", "How long the start waits for the registry."),
            (
                "etcd_authority",
                "PEM file of the authorities that sign etcd's certificates; empty is an etcd without TLS.",
            ),
            (
                "etcd_certificate",
                "PEM file of the certificate to show to etcd; empty shows none.",
            ),
            ("etcd_key", "PEM file of its private key."),
        ],
    ),
    (
        "tls",
        &[
            (
                "certificate",
                "PEM file of this process's certificate, followed by those between it and the authority; empty is no TLS.",
            ),
            ("key", "PEM file of its private key."),
            (
                "authority",
                "PEM file of the authorities that sign for this cluster and for nothing else: whoever shows a certificate of \
                theirs is a member.",
            ),
            (
                "name",
                "Name that the certificates of all members bear; empty is the host under which each one is reached.",
            ),
        ],
    ),
    (
        "model",
        &[
            ("path", "GGUF file or Hugging Face directory."),
            (
                "name",
                "Name under which clients ask for it; empty takes the file's own.",
            ),
            (
                "precision",
                "`fast`: the file's quantised weights and f16 KV; `exact`: f32 throughout.",
            ),
            (
                "kv_format",
                "What KV is rounded to: `f32`, `f16`, `bf16`, or `int8` with a scale for each head and token; `auto` goes by the precision. \
                 The same on all nodes of a model.",
            ),
            ("threads", "Threads of the engine; 0 takes one per core."),
        ],
    ),
    (
        "kv",
        &[
            ("memory", "Size of the node's pool of KV blocks."),
            ("block_tokens", "Tokens per block; the same on all nodes."),
            (
                "huge_pages",
                "Pages of the pool. `auto`: transparent huge pages where the system has them; `reserved`: those of its reserve \
                first; `off`: whatever it does by itself.",
            ),
            (
                "disk_path",
                "Folder for the disk tier, in which each node makes one of its own; empty is no disk tier.",
            ),
            ("disk_capacity", "Bytes of a node's blocks on disk."),
            (
                "disk_write_rate",
                "Bytes per second written to disk at most; 0 is no bound.",
            ),
            (
                "disk_threads",
                "Reads and writes that the disk has to do at a time, from 2; half of them may be writes.",
            ),
            (
                "disk_promote_timeout",
                "How long a request waits for blocks from its node's disk.",
            ),
            (
                "disk_errors_max",
                "Errors in a row after which the disk is bypassed.",
            ),
            (
                "disk_stall_max",
                "Longest time without an answer, after which the disk is bypassed.",
            ),
            (
                "disk_rate_min",
                "Bytes per second while busy, below which the disk is bypassed; 0 allows any.",
            ),
            (
                "disk_bypass_min",
                "First time of a bypass, which doubles with each failed probe.",
            ),
            ("disk_bypass_max", "Longest time of a bypass."),
            (
                "object_url",
                "Where long-lived prefixes are kept for all nodes: `file:///folder` or `s3://bucket/prefix`, with credentials from \
                the environment (`AWS_ACCESS_KEY_ID` and the like); empty is no object tier.",
            ),
            (
                "object_write_rate",
                "Bytes per second written to the bucket at most; 0 is no bound.",
            ),
            (
                "object_requests",
                "Requests to the bucket at a time; each may hold 4 MiB.",
            ),
            (
                "object_timeout",
                "Longest time of a request to the bucket, and of a prompt that waits for blocks from there.",
            ),
            (
                "object_uses_min",
                "Requests that had a prefix before it is written, the one that computed it included; what is pinned is written at once.",
            ),
            (
                "object_missing_ttl",
                "How long a segment that was not in the bucket is not asked for again.",
            ),
            (
                "object_errors_max",
                "Errors in a row after which the bucket is bypassed.",
            ),
            (
                "object_bypass_min",
                "First time of a bypass, which doubles with each failed probe.",
            ),
            ("object_bypass_max", "Longest time of a bypass."),
        ],
    ),
    (
        "transfer",
        &[
            (
                "transport",
                "What moves KV between nodes. `auto`: UCX for each pair where it offers more than TCP, built-in TCP for the \
                others; `tcp`: built-in TCP only; `ucx`: UCX for every pair, and no start without it.",
            ),
            (
                "ucx_library",
                "File of the UCX library; empty is `libucp.so.0`, wherever the system finds it.",
            ),
            (
                "ucx_tls",
                "Transports that UCX may use, such as `rc,sm,self` (`UCX_TLS`); empty leaves it to UCX and its environment.",
            ),
            (
                "ucx_net_devices",
                "Adapters that UCX may use, such as `mlx5_0:1,mlx5_1:1` (`UCX_NET_DEVICES`); empty leaves it to UCX.",
            ),
            (
                "ucx_max_rma_rails",
                "Adapters over which UCX spreads one transfer (`UCX_MAX_RMA_RAILS`); 0 leaves it to UCX.",
            ),
            (
                "ucx",
                "A section of any other setting of UCX, without its `UCX_`: `[transfer.ucx]` with `MAX_RNDV_RAILS = \"2\"`.",
            ),
            (
                "ucx_spin",
                "How long the thread that drives UCX looks for more work before it sleeps.",
            ),
        ],
    ),
    (
        "router",
        &[
            (
                "policy",
                "How nodes are chosen: `perigee` (least predicted time). For comparison: `kv_centric` (Algorithm 1 of the \
                 Mooncake paper), `local_cache_aware`, `least_loaded`, `dynamo`, `round_robin` or `random`.",
            ),
            (
                "local_prefill_tokens_max",
                "Most new prompt tokens that a decode node prefills by itself while a prefill node could, unless the request's limit on gaps is kept; 0: none.",
            ),
            (
                "interference_weight",
                "What one millisecond of delay of another sequence weighs, in milliseconds to the first token.",
            ),
            (
                "decode_gap_weight",
                "What one millisecond between tokens weighs, in milliseconds to the first token.",
            ),
            (
                "decode_load",
                "By which batch of a decode node the gaps between a request's tokens are predicted: `predicted` (that at the time when \
                 its prompt is computed), `reported` (that of now), or `unjudged` (that of now, and nobody is turned away for it).",
            ),
            (
                "node_queue_max",
                "How long a prompt may have to wait at a node. What would wait longer waits at the router, where more important \
                 requests overtake it.",
            ),
            (
                "ttft_slo",
                "Time to first token of requests that name no limit, and whose tenants have none; 0 is none. What is predicted to \
                 miss it is turned away.",
            ),
            ("tbt_slo", "Time between tokens, likewise."),
            ("running_requests_max", "Requests on nodes at a time."),
            ("running_prompt_tokens_max", "Prompt tokens of those."),
            (
                "waiting_requests_max",
                "Requests that wait for a place; more are turned away.",
            ),
            ("waiting_prompt_tokens_max", "Prompt tokens of those."),
            (
                "arriving_requests_max",
                "Requests being read and tokenised at a time; more are turned away.",
            ),
            ("request_deadline", "Time that a request has in all."),
            (
                "first_token_silence_max",
                "Silence of a decode node before the first token after which it counts as lost.",
            ),
            (
                "token_silence_max",
                "Silence between tokens after which it counts as lost.",
            ),
            (
                "dispatch_deadline",
                "How long opening a decode node's stream may take.",
            ),
            ("placements_max", "How often a request is placed before it fails."),
            (
                "placement_wait",
                "How long a request waits for a node to appear while none can take it.",
            ),
            ("index_entries_max", "(node, block) pairs in the prefix index."),
            (
                "decisions_kept",
                "Last decisions kept for `perigee route`, some 20 KiB each; at most 4096, and 0: none.",
            ),
            (
                "requests_kept",
                "Requests kept for `perigee request` and the live page after they have ended, some 3 KiB each; at most 16384, and \
                0: none.",
            ),
            (
                "ui",
                "Whether the live page is served at `/ui` of the HTTP port. It tells tenants, nodes and times to whoever reaches \
                the port, but nothing of prompts and answers.",
            ),
            ("body_bytes_max", "Longest body of an HTTP request."),
            (
                "api_keys_file",
                "File of the API keys that count, one line for each (`perigee key new` makes them), which is read again when it \
                changes; empty asks clients for none.",
            ),
            (
                "client_certificates",
                "Whether clients must show a certificate of the cluster where there is TLS: `optional` or `required`.",
            ),
            (
                "tenants",
                "A section for each tenant with terms of its own: `[router.tenants.NAME]` with `weight = 2`, its part of the places \
                 while requests wait (1 for all others), `priority_max = \"normal\"` (`low`, `normal` or `high`, which all others \
                 may ask for), `ttft_slo = \"2s\"` and `tbt_slo = \"50ms\"` (0 is the router's); `NAME` is `\"\"` for requests without \
                 a tenant.",
            ),
        ],
    ),
    (
        "prefill",
        &[
            ("step_tokens", "Prompt tokens of one engine step."),
            ("step_sequences_max", "Prompts of one engine step."),
            ("queue_requests_max", "Prompts that wait or are being computed."),
            (
                "queue_tokens_max",
                "Tokens of those prompts that are still to be computed.",
            ),
            ("sessions_max", "Streams from decode nodes open at a time."),
            (
                "start_timeout",
                "How long a new stream may take to say what it wants.",
            ),
            (
                "offer_timeout",
                "How long a decode node may take to offer memory.",
            ),
            (
                "heartbeat_interval",
                "How often a request that has nothing else to say tells its decode node that it lives.",
            ),
            (
                "request_timeout_max",
                "Longest time of one request, whatever it asks for.",
            ),
            ("fetch_timeout", "Longest time for fetching a prefix from peers."),
            (
                "memory_retry_interval",
                "How often a request looks again for memory that readers hold.",
            ),
            ("write_timeout", "Longest time of one write to a decode node."),
            (
                "quiesce_timeout",
                "How long the writes of an aborted request may take to end by themselves.",
            ),
            ("writes_in_flight_max", "Writes of one request in flight."),
            ("write_bytes_max", "Bytes of one write."),
            ("write_slices_max", "Slices of one write."),
            (
                "drain_timeout",
                "How long requests may go on after the node was told to end.",
            ),
        ],
    ),
    (
        "decode",
        &[
            ("sequences_max", "Sequences in the batch."),
            (
                "step_tokens",
                "Rows of one engine step at most; prompts get fewer where sequences name a limit on gaps.",
            ),
            ("requests_max", "Requests accepted at a time, in every state."),
            (
                "request_timeout_max",
                "Longest time of one request, whatever its deadline says.",
            ),
            (
                "allocate_timeout",
                "How long a handoff waits for blocks before the request queues for them.",
            ),
            (
                "stall_timeout",
                "Silence of a prefill node after which its handoff is given up.",
            ),
            (
                "fence_timeout",
                "How long a request waits for the fence of its handoff.",
            ),
            (
                "blocks_poll",
                "How often a request that waits for blocks looks again.",
            ),
            (
                "drain_timeout",
                "How long requests may go on after the node was told to end.",
            ),
            (
                "messages_ahead_max",
                "Messages that are made before the client takes them.",
            ),
        ],
    ),
    (
        "store",
        &[
            ("lease_ttl_max", "Longest lease that a reader gets."),
            ("leases_max", "Leases open at a time."),
            (
                "reservation_ttl_max",
                "Longest time between a writer's `Reserve` and `Commit`.",
            ),
            ("reservations_max", "Reservations open at a time."),
            (
                "expiry_interval",
                "How often leases and reservations are checked for their end.",
            ),
            ("hashes_max", "Blocks that one `Acquire` or `Reserve` may name."),
            (
                "log_entries_max",
                "Entries of the log that watchers can resume from.",
            ),
            ("watch_buffer_events", "Events in one message of the log."),
            ("watchers_max", "Watchers of the log at a time."),
            ("fetches_max", "Fetches from peers at a time."),
            ("fetch_batch_bytes", "Bytes that one fetch has in flight."),
            (
                "prefetches_max",
                "Prefixes that are read from disk ahead of their request at a time.",
            ),
            (
                "acquire_timeout",
                "Longest wait for a peer's answer to `Acquire`.",
            ),
            (
                "eviction",
                "Which block goes when memory is short: `returns`, `lru`, `lfu` or `s3fifo`.",
            ),
            (
                "cooperation_bytes_per_second",
                "Bytes per second given to peers instead of being dropped, and as many taken; 0 does neither.",
            ),
            (
                "copies_max",
                "Nodes that hold a block beyond which moves between them make no copy more of it.",
            ),
            (
                "offer_timeout",
                "Longest wait for a peer that takes what it was offered.",
            ),
            (
                "handover_timeout",
                "Longest time for which a node that ends gives its blocks to its peers.",
            ),
            (
                "pins_max",
                "Prefixes pinned at a time; together they hold at most half of the pool.",
            ),
            (
                "scrub_bytes_per_second",
                "Bytes per second verified in the background; 0 verifies none.",
            ),
            (
                "tenant_bytes_max",
                "Bytes of blocks that a tenant may have in a node's pool; 0 is no bound.",
            ),
            (
                "tenants",
                "A section for each tenant with limits of its own: `[store.tenants.NAME]` with `bytes_max = \"1GiB\"` (0 is no \
                bound, nothing is that of all) and `weight = 2`, its part of the pool when memory is short (1 for all others); \
                `NAME` is `\"\"` for requests without a tenant.",
            ),
        ],
    ),
    (
        "log",
        &[
            ("format", "`text` or `json`."),
            ("filter", "Levels by module, such as `info,kv_store=debug`."),
        ],
    ),
    (
        "telemetry",
        &[
            (
                "otlp_endpoint",
                "`host:port` of a collector that takes OTLP over gRPC, to which routers export the trace of every request; empty is \
                none.",
            ),
            (
                "sample_ratio",
                "Part of the requests that bring no `traceparent` whose trace is exported, from 0 to 1; those that bring one decide \
                by themselves.",
            ),
        ],
    ),
];

/// The page.
pub(super) fn markdown() -> anyhow::Result<String> {
    let defaults = toml::Table::try_from(Settings::default())?;
    let mut page = String::from(
        "# Configuration\n\n\
        Settings come from a TOML file (`--config FILE`), the environment (`PERIGEE_SECTION__KEY`), and flags (`--set \
        SECTION.KEY=VALUE`, and those of `perigee ROLE --help`), each over the one before. Unknown keys are reported at \
        the start and refused by `--check-config`.\n\n\
        Printed by `perigee config --markdown`; the defaults are the code's.\n",
    );
    for (section, settings) in DESCRIPTIONS {
        write!(
            page,
            "\n## `[{section}]`\n\n| setting | default | what it does |\n|---|---|---|\n"
        )?;
        for (key, description) in *settings {
            let default = defaults.get(*section).and_then(|section| section.get(*key));
            let default = default.map_or_else(String::new, Value::to_string);
            writeln!(page, "| `{key}` | `{default}` | {description} |")?;
        }
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_setting_is_described_and_nothing_else() {
        let defaults = toml::Table::try_from(Settings::default()).expect("serialises");
        let keys = |section: &Value| -> BTreeSet<String> {
            section.as_table().expect("section").keys().cloned().collect()
        };
        let real: BTreeSet<(String, String)> = defaults
            .iter()
            .flat_map(|(section, value)| keys(value).into_iter().map(move |key| (section.clone(), key)))
            .collect();
        let described: BTreeSet<(String, String)> = DESCRIPTIONS
            .iter()
            .flat_map(|(section, settings)| {
                settings.iter().map(|(key, _)| ((*section).into(), (*key).into()))
            })
            .collect();
        assert_eq!(real, described);
    }

    #[test]
    fn the_page_in_docs_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let page = std::fs::read_to_string(path).unwrap_or_default();
        let wanted = markdown().expect("page");
        assert!(
            page == wanted,
            "run: target/release/perigee config --markdown > docs/configuration.md"
        );
    }
}
