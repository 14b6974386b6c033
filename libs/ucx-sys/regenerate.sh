#!/usr/bin/env bash
# Writes src/bindings.rs anew from the headers of UCX 1.13, the oldest version that is served: structs only ever
# grew since, and a field mask tells the library which fields a caller knows.
#
# Needs: bindgen 0.73 (`cargo install bindgen-cli`), libclang, and the headers (Debian 12: `libucx-dev`).
set -euo pipefail
cd "$(dirname "$0")"

functions=(
    ucp_get_version ucp_config_read ucp_config_modify ucp_config_release ucp_init_version ucp_cleanup
    ucp_worker_create ucp_worker_destroy ucp_worker_get_address ucp_worker_release_address ucp_worker_get_efd
    ucp_worker_arm ucp_worker_progress
    ucp_mem_map ucp_mem_unmap ucp_mem_query ucp_rkey_pack ucp_rkey_buffer_release
    ucp_ep_create ucp_ep_close_nbx ucp_ep_print_info ucp_ep_rkey_unpack ucp_rkey_ptr ucp_rkey_destroy
    ucp_get_nbx ucp_put_nbx ucp_ep_flush_nbx ucp_request_check_status ucp_request_free
    ucs_status_string
)
allowed=$(IFS='|' && echo "${functions[*]}")
# libclang alone has no stddef.h; the C compiler has.
builtin=$(dirname "$(${CC:-cc} -print-file-name=include/stddef.h)")

bindgen wrapper.h --output src/bindings.rs \
    --dynamic-loading Ucp --dynamic-link-require-all --allowlist-function "$allowed" --allowlist-var 'UCP_API_(MAJOR|MINOR)|UCP_MEM_MAP_(NONBLOCK|ALLOCATE)|UCP_OP_ATTR_.*' \
    --allowlist-type 'ucp_.*_field|ucp_op_attr_t|ucp_feature|ucp_ep_close_flags_t|ucp_mem_advice' \
    --blocklist-type 'FILE|_IO_.*' --disable-header-comment \
    --raw-line '//! Raw bindings of UCP 1.13: written by `regenerate.sh`, not by hand.' \
    --raw-line '#![allow(missing_docs, non_camel_case_types, non_upper_case_globals, non_snake_case)]' \
    --raw-line '#![allow(clippy::all, clippy::undocumented_unsafe_blocks, dead_code, unreachable_pub, unused_qualifications)]' \
    --raw-line 'use libc::FILE;' \
    --wrap-unsafe-ops --rust-target 1.90 --rust-edition 2024 --no-doc-comments --no-prepend-enum-name \
    --merge-extern-blocks --use-core -- -I"$builtin" "$@"
rustfmt --edition 2024 src/bindings.rs
