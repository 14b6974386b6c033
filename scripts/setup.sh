#!/usr/bin/env bash
# Installs what a target needs and the machine lacks. `build`: a C compiler and protoc (for etcd-client's own build).
# `test`: also etcd, cargo-nextest, a Python environment with the official clients, and what checks the Helm chart.
# `image`: also podman, for `make test-image`.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
need() { # COMMAND DEBIAN_PACKAGE
    command -v "$1" >/dev/null || missing+=("$2")
}

need cc gcc
need protoc protobuf-compiler
# What etcd-client's protos import: the compiler's package only recommends it.
[[ -e /usr/include/google/protobuf/descriptor.proto || -e /usr/local/include/google/protobuf/descriptor.proto ]] ||
    missing+=(libprotobuf-dev)
need python3 python3
if [[ ${1:-build} == image ]]; then
    need podman podman
    need runc runc
    [[ -e /usr/lib/cni/bridge || -e /opt/cni/bin/bridge || -e /usr/libexec/cni/bridge ]] || missing+=(containernetworking-plugins)
fi
if [[ ${1:-build} == test || ${1:-build} == image ]]; then
    need promtool prometheus
    need etcd etcd-server
    need etcdctl etcd-client
    need ip iproute2
    # UCX and its headers. Nothing is built with them: the tests use the one and compare bindings with the others.
    [[ -e /usr/include/ucp/api/ucp.h ]] || missing+=(libucx0 libucx-dev)
fi

if ((${#missing[@]})); then
    echo "setup: installing ${missing[*]}" >&2
    if ! command -v apt-get >/dev/null; then
        echo "setup: this is no Debian; install what provides: ${missing[*]}" >&2
        exit 69
    fi
    sudo=()
    ((EUID == 0)) || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is missing; install Rust 1.90 or newer from https://rustup.rs" >&2
    exit 69
fi

if [[ ${1:-build} == test || ${1:-build} == image ]]; then
    if ! cargo nextest --version >/dev/null 2>&1; then
        echo "setup: installing cargo-nextest" >&2
        cargo install cargo-nextest --locked --quiet
    fi
    if ! cmp -s tests/python/requirements.txt .venv/requirements.txt; then
        echo "setup: installing the official openai and grpc clients into .venv" >&2
        python3 -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
        cp tests/python/requirements.txt .venv/requirements.txt
    fi
    .venv/bin/python scripts/chart_tools.py .venv/tools
fi
