#!/usr/bin/env bash
# image_root.sh FOLDER BINARY…: makes the root of an image that has nothing but these binaries and what they load.
#
# The system's UCX is among it where it is installed: it is loaded at run time, so a static binary could not use it. There is no shell, and
# nothing that could be written to.
set -euo pipefail

root=$1
shift
mkdir -p "$root"/{usr/bin,usr/lib,usr/lib64,etc/ssl/certs,tmp,models,etc/perigee,var/lib}
chmod 1777 "$root/tmp"
ln -sfn usr/lib "$root/lib"
ln -sfn usr/lib64 "$root/lib64"

# The file under its own path, and under each link on the way.
add() {
    local path=$1
    [[ -e $root$path ]] && return
    mkdir -p "$root$(dirname "$path")"
    cp -L "$path" "$root$path"
}

# What a binary or a library loads, by the loader's own word.
add_libraries() {
    local library
    while read -r library; do add "$library"; done < <(ldd "$1" | grep -o '/[^ ]*')
}

for binary in "$@"; do
    install -m 0755 "$binary" "$root/usr/bin/$(basename "$binary")"
    add_libraries "$binary"
done

# Names are resolved by the C library's own modules since glibc 2.34.
echo "hosts: files dns" >"$root/etc/nsswitch.conf"
echo "perigee:x:65532:65532::/:/usr/bin/perigee" >"$root/etc/passwd"
echo "perigee:x:65532:" >"$root/etc/group"
if [[ -e /etc/ssl/certs/ca-certificates.crt ]]; then
    cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
fi

ucx=$(ldconfig -p | awk '$1 == "libucp.so.0" {print $NF; exit}')
if [[ -n $ucx ]]; then
    folder=$(dirname "$ucx")
    # Transports are modules beside the library, and drivers of adapters are modules of libibverbs.
    for library in "$folder"/libuc[mpst].so.0 "$folder"/ucx/*.so.0 "$folder"/libibverbs.so.1 "$folder"/libibverbs/*.so; do
        [[ -e $library ]] || continue
        add "$library"
        add_libraries "$library"
    done
    # The modules are opened by their names without a version.
    for module in "$root$folder"/ucx/*.so.0; do
        [[ -e $module ]] && ln -sf "$(basename "$module")" "${module%.0}"
    done
    if [[ -d /etc/libibverbs.d ]]; then
        cp -rL /etc/libibverbs.d "$root/etc/"
    fi
fi
