#!/usr/bin/env python3
"""Writes the Grafana dashboards of the chart, helm/perigee/files/dashboards/*.json, from what stands here.

    python3 scripts/dashboards.py [--check]

With --check nothing is written, and the exit code is 1 if a file is not what would be.
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "helm/perigee/files/dashboards"
# What the variables at the top of each dashboard select.
SELECT = 'namespace="$namespace",release="$release"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 7, 3


def rate(metric, by, extra=""):
    return f"sum by ({by}) (rate({metric}{{{SELECT}{extra}}}[$__rate_interval]))"


def total(metric, by, extra=""):
    return f"sum by ({by}) ({metric}{{{SELECT}{extra}}})"


def part(metric, of, by, extra=""):
    """How much of `of` is `metric`, both counters."""
    return f"{rate(metric, by, extra)} / {rate(of, by)}"


def quantiles(metric, by=""):
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return [
        (f"histogram_quantile({q}, {rate(metric + '_bucket', labels)})", f"p{int(q * 100)}{legend}") for q in (0.5, 0.9, 0.99)
    ]



# Title, unit, and for each line its query and its name.
DASHBOARDS = {
    "overview": (
        "Perigee: service",
        [
            ("Requests by code", "reqps", [(rate("perigee_router_requests_total", "code"), "{{code}}")]),
            ("Running and waiting", "short", [
                (total("perigee_router_running_requests", "release"), "running"),
                (total("perigee_router_waiting_requests", "release"), "waiting"),
            ]),
            ("Decode nodes that take requests", "short", [(f"min(perigee_router_decode_nodes{{{SELECT}}})", "nodes")]),
            ("Time to first token", "s", quantiles("perigee_router_time_to_first_token_seconds")),
            ("Time between tokens", "s", quantiles("perigee_router_inter_token_latency_seconds")),
            ("Error of the predicted time to first token", "s", quantiles("perigee_router_time_to_first_token_error_seconds")),
            ("Tokens", "short", [
                (rate("perigee_router_prompt_tokens_total", "release"), "prompts, per second"),
                (rate("perigee_router_cached_tokens_total", "release"), "of those cached"),
                (rate("perigee_router_completion_tokens_total", "release"), "generated, per second"),
            ]),
            ("Prompt tokens from a cache", "percentunit", [
                (part("perigee_router_cached_tokens_total", "perigee_router_prompt_tokens_total", "release"), "cached"),
            ]),
            ("Requests placed again", "reqps", [(rate("perigee_router_replacements_total", "pod"), "{{pod}}")]),
        ],
    ),
    "nodes": (
        "Perigee: prefill and decode",
        [
            ("Tokens that wait for prefill", "short", [(total("perigee_prefill_queued_tokens", "pod"), "{{pod}}")]),
            ("Prompts that wait or are computed", "short", [(total("perigee_prefill_queued_requests", "pod"), "{{pod}}")]),
            ("Wait for prefill", "s", quantiles("perigee_prefill_queue_seconds", "pool")),
            ("Prompt tokens computed", "short", [
                (rate("perigee_prefill_computed_tokens_total", "pod"), "{{pod}}"),
                (rate("perigee_decode_prefill_tokens_total", "pod"), "{{pod}}, by itself"),
            ]),
            ("Step of prefill", "s", quantiles("perigee_prefill_step_seconds", "pool")),
            ("Prefill requests by outcome", "reqps", [(rate("perigee_prefill_requests_total", "outcome"), "{{outcome}}")]),
            ("Sequences in the batch", "short", [(total("perigee_decode_running", "pod"), "{{pod}}")]),
            ("Accepted and not in the batch", "short", [(total("perigee_decode_waiting", "pod"), "{{pod}}")]),
            ("Step of decode", "s", quantiles("perigee_decode_step_seconds", "pool")),
            ("Tokens generated", "short", [(rate("perigee_decode_tokens_total", "pod"), "{{pod}}")]),
            ("KV memory in use", "percentunit", [(
                total("perigee_kvstore_blocks", "pod", ',role="decode",state=~"owned|pinned"')
                + " / " + total("perigee_kvstore_blocks", "pod", ',role="decode"'), "{{pod}}",
            )]),
            ("Sequences that lost their blocks", "reqps", [(rate("perigee_decode_preemptions_total", "pod"), "{{pod}}")]),
        ],
    ),
    "cache": (
        "Perigee: cache",
        [
            ("Blocks by state", "short", [(total("perigee_kvstore_blocks", "state"), "{{state}}")]),
            ("Blocks asked for and held", "percentunit", [(
                f"{rate('perigee_kvstore_hit_blocks_total', 'pod')} / ({rate('perigee_kvstore_hit_blocks_total', 'pod')}"
                f" + {rate('perigee_kvstore_missed_blocks_total', 'pod')})", "{{pod}}",
            )]),
            ("Blocks that left", "short", [
                (rate("perigee_kvstore_evicted_blocks_total", "release"), "evicted"),
                (rate("perigee_kvstore_dropped_blocks_total", "reason"), "dropped, {{reason}}"),
                (rate("perigee_kvstore_given_blocks_total", "release"), "given to peers"),
            ]),
            ("Bytes fetched from peers", "Bps", [(rate("perigee_kvstore_fetched_bytes_total", "pod"), "{{pod}}")]),
            ("Fetches and questions that failed", "short", [
                (rate("perigee_kvstore_fetch_failures_total", "pod"), "{{pod}}, fetch"),
                (rate("perigee_kvstore_peer_failures_total", "pod"), "{{pod}}, question"),
            ]),
            ("Limits of tenants", "short", [
                (rate("perigee_kvstore_tenant_evicted_blocks_total", "reason"), "evicted, {{reason}}"),
                (rate("perigee_kvstore_tenant_refused_blocks_total", "release"), "not cached"),
            ]),
            ("Blocks on disk", "short", [
                (total("perigee_kvstore_disk_blocks", "pod"), "{{pod}}"),
                (total("perigee_kvstore_disk_capacity_blocks", "pod"), "{{pod}}, capacity"),
            ]),
            ("Disk", "Bps", [
                (rate("perigee_kvstore_disk_read_bytes_total", "pod"), "{{pod}}, read"),
                (rate("perigee_kvstore_disk_written_bytes_total", "pod"), "{{pod}}, written"),
            ]),
            ("Disk in use (1), bypassed or absent (0)", "short", [(total("perigee_kvstore_disk_readable", "pod"), "{{pod}}")]),
            ("Bucket", "Bps", [
                (rate("perigee_kvstore_object_read_bytes_total", "pod"), "{{pod}}, read"),
                (rate("perigee_kvstore_object_written_bytes_total", "pod"), "{{pod}}, written"),
            ]),
            ("Blocks that had changed", "short", [
                (rate("perigee_kvstore_corruptions_total", "pod"), "{{pod}}, memory"),
                (rate("perigee_kvstore_disk_corruptions_total", "pod"), "{{pod}}, disk"),
                (rate("perigee_kvstore_object_corruptions_total", "pod"), "{{pod}}, bucket"),
            ]),
            ("Prefix index of the routers", "short", [
                (total("perigee_router_index_blocks", "pod"), "{{pod}}"),
                (total("perigee_router_index_refused_blocks", "pod"), "{{pod}}, had no room"),
            ]),
        ],
    ),
    "transfers": (
        "Perigee: transfers",
        [
            ("Bytes by what moved them", "Bps", [(rate("perigee_transfer_bytes_total", "transport, direction"), "{{transport}}, {{direction}}")]),
            ("Handoffs by outcome", "reqps", [(rate("perigee_decode_handoffs_total", "outcome"), "{{outcome}}")]),
            ("Bytes handed off", "Bps", [
                (rate("perigee_prefill_handoff_bytes_total", "pod"), "{{pod}}, sent"),
                (rate("perigee_decode_handoff_bytes_total", "pod"), "{{pod}}, received"),
            ]),
            ("Handoff after the computation", "s", quantiles("perigee_prefill_handoff_exposed_seconds")),
            ("Handoff hidden behind the computation", "s", quantiles("perigee_prefill_handoff_hidden_seconds")),
            ("In progress", "short", [(total("perigee_transfers_in_flight", "pod"), "{{pod}}")]),
            ("Failed, by code", "short", [(rate("perigee_transfer_failures_total", "code"), "{{code}}")]),
            ("Refused to peers, by code", "short", [(rate("perigee_transfer_refusals_total", "code"), "{{code}}")]),
            ("Connections from peers", "short", [
                (total("perigee_transfer_connections_served", "pod"), "{{pod}}"),
                (rate("perigee_transfer_connections_rejected_total", "pod"), "{{pod}}, rejected per second"),
            ]),
        ],
    ),
}


def panel(number, title, unit, lines):
    targets = [
        {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": query, "legendFormat": name}
        for at, (query, name) in enumerate(lines)
    ]
    row, column = divmod(number, COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": targets,
    }


def dashboard(name, title, panels):
    def variable(label, query):
        return {"name": label, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, "sort": 1}

    return {
        "uid": f"perigee-{name}",
        "title": title,
        "tags": ["perigee"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "Perigee", "tags": ["perigee"], "asDropdown": True, "includeVars": True, "keepTime": True}],
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                variable("namespace", "label_values(perigee_router_decode_nodes, namespace)"),
                variable("release", 'label_values(perigee_router_decode_nodes{namespace="$namespace"}, release)'),
            ]
        },
        "panels": [panel(number, *spec) for number, spec in enumerate(panels)],
    }


def main():
    stale = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (title, panels) in DASHBOARDS.items():
        path = FOLDER / f"{name}.json"
        text = json.dumps(dashboard(name, title, panels), indent=1) + "\n"
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}: run scripts/dashboards.py without --check", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
