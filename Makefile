# The two commands of the README are `make demo` and `make test`.

CARGO ?= cargo
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
PERIGEE := $(or $(CARGO_TARGET_DIR),target)/release/perigee
VENV := .venv

# What is run again without UCX, and with another version of it than the system's.
USES_UCX := package(transfer) | package(ucx-sys) | binary(conversation) | binary(failure) | binary(identity) | binary(operate)

export PERIGEE_MODEL ?= $(CURDIR)/$(MODEL)

.PHONY: demo test test-image bench-engine bench-handoff bench-transfer bench-store bench-router bench-eviction bench-table bench-cooperative lint format build setup setup-test clean help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: build $(MODEL) ## A real model answers through separate prefill and decode processes
	$(PERIGEE) demo --model $(MODEL)

# Binary and tests are built by one command: apart, their dependencies would have other features, and be built twice.
test: setup setup-test ## Install what the tests need, run all of them
	$(CARGO) build --release --locked --workspace --bins --tests
	$(PERIGEE) model pull smollm2-135m-instruct --to models
	$(CARGO) nextest run --release --locked --workspace $(if $(CI),--profile ci) $(NEXTEST)
	scripts/with-ucx.sh absent $(CARGO) nextest run --release --locked --workspace $(if $(CI),--profile ci) -E '$(USES_UCX)'
	scripts/with-ucx.sh pypi $(CARGO) nextest run --release --locked --workspace $(if $(CI),--profile ci) -E '$(USES_UCX)'

test-image: $(MODEL) ## Build the image and run what the Helm chart renders, with podman; needs root
	scripts/setup.sh image
	.venv/bin/python scripts/image_test.py --perigee $(PERIGEE) --model $(MODEL)

bench-engine: setup $(MODEL) ## Measure the engine beside llama.cpp and the machine's limits; writes docs/performance.md
	python3 scripts/bench_engine.py $(BENCH)

bench-handoff: $(MODEL) ## Measure the layer push between two processes; writes docs/performance.md
	python3 scripts/bench_handoff.py $(BENCH)

bench-transfer: setup ## Measure transfers beside bare TCP, ucx_perftest and Mooncake; writes docs/performance.md
	python3 scripts/bench_transfer.py $(BENCH)

bench-store: setup ## Measure a store node beside Mooncake Store; writes docs/performance.md
	python3 scripts/bench_store.py $(BENCH)

bench-router: setup $(MODEL) ## Measure the router beside dynamo-kv-router and sglang-router; writes docs/performance.md
	python3 scripts/bench_router.py $(BENCH)

bench-cooperative: ## Simulate pools that hold blocks for each other, over TRACE=a trace of block ids; see docs/cooperation.md
	$(CARGO) run --release --locked -p sim --example cooperation -- $(TRACE)

bench-eviction: setup ## Replay traces against every eviction policy and the optimum; writes docs/eviction.md
	python3 scripts/bench_eviction.py $(BENCH)

bench-table: setup ## Measure lookups in a full block table, and what holds its lock; writes docs/eviction.md
	python3 scripts/bench_table.py

lint: setup ## Formatting, clippy, documentation, dependency rules
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --workspace --no-deps --locked --quiet
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny --offline check bans licenses sources; \
	else echo "lint: cargo-deny is not installed, its checks are skipped"; fi

format: ## Format the code
	$(CARGO) fmt --all

build: setup ## Build the binary
	$(CARGO) build --release --locked -p perigee

$(MODEL): | build
	$(PERIGEE) model pull smollm2-135m-instruct --to models

setup:
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh test

clean: ## Remove build output; keeps models
	$(CARGO) clean
	rm -rf $(VENV)
