//! What this host offers for moving memory: limits, shared memory, RDMA adapters and their ports.
//!
//! Read from the files of the kernel alone, below a root, so that a folder can stand for a host with adapters that this
//! one does not have. Nothing here fails: what cannot be read was not found.
//!
//! Elsewhere: the facts ([`types::HostFacts`]), what they mean (`perigee check`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use types::{HostFacts, RdmaDevice, RdmaGid, RdmaPort};

/// Entries of a folder that are looked at: adapters, ports, device files. Hosts have some tens.
const ENTRIES_MAX: usize = 256;
/// The bit of `CAP_IPC_LOCK` in a capability set.
const IPC_LOCK_BIT: u32 = 14;

/// Reads the files below `root`, which is `/` but in tests. Blocks for some milliseconds.
pub fn read(root: &Path) -> HostFacts {
    let mounts = text(root, "proc/self/mountinfo").unwrap_or_default();
    let shm = shm_mount(&mounts);
    let memory = text(root, "proc/meminfo").unwrap_or_default();
    let huge = |key| meminfo(&memory, key).unwrap_or(0);
    HostFacts {
        boot_id: line(root, "proc/sys/kernel/random/boot_id").unwrap_or_default(),
        ipc_namespace: ipc_namespace(root),
        memlock_bytes: text(root, "proc/self/limits").and_then(|limits| memlock(&limits)),
        ipc_lock: text(root, "proc/self/status").is_some_and(|status| holds_ipc_lock(&status)),
        shm_bytes: shm.flatten(),
        shm_mounted: shm.is_some(),
        shmmax_bytes: line(root, "proc/sys/kernel/shmmax").and_then(|bytes| bytes.parse().ok()),
        huge_pages_free: huge("HugePages_Free"),
        huge_page_bytes: huge("Hugepagesize") << 10,
        verbs_devices: names(root, "dev/infiniband"),
        rdma_devices: rdma_devices(root),
        gid_index: None,
    }
}

/// The index of the GID that UCX is told to use: by `settings`, which are UCX's without their prefix, or else by the
/// environment. `auto` is none.
pub fn gid_index(settings: &BTreeMap<String, String>) -> Option<u32> {
    let of_environment = || std::env::var("UCX_IB_GID_INDEX").ok();
    let index = settings.get("IB_GID_INDEX").cloned().or_else(of_environment);
    index.and_then(|index| index.trim().parse().ok())
}

fn text(root: &Path, path: &str) -> Option<String> {
    fs::read_to_string(root.join(path)).ok()
}

fn line(root: &Path, path: &str) -> Option<String> {
    text(root, path).map(|text| text.trim().to_owned())
}

/// The names in a folder, in order.
fn names(root: &Path, path: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root.join(path)) else {
        return Vec::new();
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.take(ENTRIES_MAX).collect();
    names.sort();
    names
}

/// `ipc:[4026531839]`.
fn ipc_namespace(root: &Path) -> Option<u64> {
    let target = fs::read_link(root.join("proc/self/ns/ipc")).ok()?;
    let target = target.to_str()?;
    target.strip_prefix("ipc:[")?.strip_suffix(']')?.parse().ok()
}

/// The soft limit: `Max locked memory         8388608              8388608              bytes`.
fn memlock(limits: &str) -> Option<u64> {
    let rest = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// `CapEff: 000001ffffffffff`, with a tab after the colon.
fn holds_ipc_lock(status: &str) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.is_some_and(|set| set >> IPC_LOCK_BIT & 1 == 1)
}

/// Whether `/dev/shm` is mounted, and with which size. A line of `mountinfo` has the mount point as its fifth word, and
/// the options of the file system as its last.
fn shm_mount(mounts: &str) -> Option<Option<u64>> {
    // The last mount over a place is the one that is seen.
    let mount = mounts
        .lines()
        .rfind(|line| line.split(' ').nth(4) == Some("/dev/shm"))?;
    let options = mount.rsplit(' ').next()?;
    let size = options.split(',').find_map(|option| option.strip_prefix("size="));
    Some(size.and_then(size_bytes))
}

/// `65536k`.
fn size_bytes(size: &str) -> Option<u64> {
    let (digits, shift) = match size.as_bytes().last()? {
        b'k' => (&size[..size.len() - 1], 10),
        b'm' => (&size[..size.len() - 1], 20),
        b'g' => (&size[..size.len() - 1], 30),
        _ => (size, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// `HugePages_Free:        0`, `Hugepagesize:       2048 kB`.
fn meminfo(memory: &str, key: &str) -> Option<u64> {
    let rest = memory.lines().find_map(|line| line.strip_prefix(key))?;
    rest.strip_prefix(':')?.split_whitespace().next()?.parse().ok()
}

fn rdma_devices(root: &Path) -> Vec<RdmaDevice> {
    let devices = names(root, "sys/class/infiniband").into_iter();
    devices
        .map(|name| {
            let folder = format!("sys/class/infiniband/{name}");
            let numbers = names(root, &format!("{folder}/ports")).into_iter();
            let mut ports: Vec<RdmaPort> = numbers
                .filter_map(|number| Some(rdma_port(root, &folder, number.parse().ok()?)))
                .collect();
            ports.sort_by_key(|port| port.number);
            RdmaDevice { name, ports }
        })
        .collect()
}

fn rdma_port(root: &Path, device: &str, number: u32) -> RdmaPort {
    let folder = format!("{device}/ports/{number}");
    let gids = gids(root, &folder);
    // Each address names its interface; a port without addresses is found by its device, which may have several.
    let interface = line(root, &format!("{folder}/gid_attrs/ndevs/0"))
        .filter(|name| !name.is_empty())
        .or_else(|| names(root, &format!("{device}/device/net")).into_iter().next());
    let mtu = interface
        .as_ref()
        .and_then(|name| line(root, &format!("sys/class/net/{name}/mtu")));
    RdmaPort {
        number,
        // `4: ACTIVE`.
        state: line(root, &format!("{folder}/state"))
            .map(|state| {
                state
                    .split_once(": ")
                    .map_or(state.clone(), |(_, name)| name.to_owned())
            })
            .unwrap_or_default(),
        link_layer: line(root, &format!("{folder}/link_layer")).unwrap_or_default(),
        rate: line(root, &format!("{folder}/rate")).unwrap_or_default(),
        interface,
        mtu_bytes: mtu.and_then(|mtu| mtu.parse().ok()),
        gids,
    }
}

fn gids(root: &Path, port: &str) -> Vec<RdmaGid> {
    let indices = names(root, &format!("{port}/gids")).into_iter();
    let mut gids: Vec<RdmaGid> = indices
        .filter_map(|index| {
            let gid = line(root, &format!("{port}/gids/{index}"))?;
            let set = gid.chars().any(|digit| digit != '0' && digit != ':');
            set.then(|| RdmaGid {
                kind: line(root, &format!("{port}/gid_attrs/types/{index}")).unwrap_or_default(),
                index: index.parse().unwrap_or(u32::MAX),
                gid,
            })
        })
        .collect();
    gids.sort_by_key(|gid| gid.index);
    gids
}

#[cfg(test)]
mod tests;
