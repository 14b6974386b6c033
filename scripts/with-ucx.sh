#!/usr/bin/env bash
# with-ucx.sh VARIANT COMMAND…: runs a command with the system's UCX (`system`), with the one of PyPI's libucx-cu12
# (`pypi`, from the tests' Python environment), or with none that can be loaded (`absent`).
set -euo pipefail
cd "$(dirname "$0")/.."

variant=$1
shift
case $variant in
system) folder= ;;
pypi)
    folder=$(echo "$PWD"/.venv/lib/python3*/site-packages/libucx/lib)
    [[ -e $folder/libucp.so.0 ]] || { echo "with-ucx: no UCX in .venv: run scripts/setup.sh test" >&2; exit 69; }
    ;;
absent)
    # A file of that name which is no library ends the search for it.
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    echo "no library" >"$folder/libucp.so.0"
    ;;
*)
    echo "with-ucx: no variant $variant: system, pypi or absent" >&2
    exit 64
    ;;
esac
echo "with-ucx: $variant" >&2
LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "$@"
