use std::os::unix::fs::symlink;

use super::*;

/// A folder that stands for a host.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self) -> HostFacts {
        read(self.0.path())
    }
}

#[test]
fn a_host_without_anything_has_no_facts() {
    assert_eq!(Root::new().read(), HostFacts::default());
}

#[test]
fn limits_and_shared_memory_are_read() {
    let root = Root::new();
    root.file("proc/sys/kernel/random/boot_id", "9a11a213-6591\n");
    root.file("proc/sys/kernel/shmmax", "18446744073692774399\n");
    root.file(
        "proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units\n\
        Max locked memory         65536                unlimited            bytes\n",
    );
    root.file("proc/self/status", "Name:\tperigee\nCapEff:\t00000000a80425fb\n");
    root.file(
        "proc/self/mountinfo",
        "24 1 0:22 / / rw - ext4 /dev/vda rw\n\
        25 24 0:23 / /dev/shm rw,relatime shared:3 - tmpfs tmpfs rw,size=65536k\n",
    );
    root.file(
        "proc/meminfo",
        "HugePages_Total:      16\nHugePages_Free:       12\nHugepagesize:       2048 kB\n",
    );
    let namespaces = root.0.path().join("proc/self/ns");
    fs::create_dir_all(&namespaces).unwrap();
    symlink("ipc:[4026531839]", namespaces.join("ipc")).unwrap();
    assert_eq!(
        root.read(),
        HostFacts {
            boot_id: "9a11a213-6591".into(),
            ipc_namespace: Some(4_026_531_839),
            memlock_bytes: Some(65_536),
            shm_bytes: Some(64 << 20),
            shm_mounted: true,
            shmmax_bytes: Some(18_446_744_073_692_774_399),
            huge_pages_free: 12,
            huge_page_bytes: 2 << 20,
            ..HostFacts::default()
        }
    );
}

#[test]
fn no_limit_is_no_limit() {
    let root = Root::new();
    root.file(
        "proc/self/limits",
        "Max locked memory         unlimited            unlimited            bytes\n",
    );
    root.file("proc/self/status", "CapEff:\t0000000000004000\n");
    root.file(
        "proc/self/mountinfo",
        "25 24 0:23 / /dev/shm rw - tmpfs tmpfs rw\n",
    );
    let facts = root.read();
    assert_eq!(
        (
            facts.memlock_bytes,
            facts.ipc_lock,
            facts.shm_mounted,
            facts.shm_bytes
        ),
        (None, true, true, None)
    );
}

#[test]
fn adapters_ports_and_addresses_are_read() {
    let root = Root::new();
    root.file("dev/infiniband/uverbs0", "");
    root.file("dev/infiniband/rdma_cm", "");
    let port = "sys/class/infiniband/mlx5_0/ports/1";
    root.file(&format!("{port}/state"), "4: ACTIVE\n");
    root.file(&format!("{port}/link_layer"), "Ethernet\n");
    root.file(&format!("{port}/rate"), "100 Gb/sec (4X EDR)\n");
    let none = "0000:0000:0000:0000:0000:0000:0000:0000\n";
    for (index, gid, kind) in [
        (0, "fe80:0000:0000:0000:ba59:9fff:fe1a:2b3c\n", "IB/RoCE v1\n"),
        (3, "0000:0000:0000:0000:0000:ffff:0a00:0001\n", "RoCE v2\n"),
        (4, none, ""),
        (10, "fe80:0000:0000:0000:ba59:9fff:fe1a:2b3d\n", "RoCE v2\n"),
    ] {
        root.file(&format!("{port}/gids/{index}"), gid);
        root.file(&format!("{port}/gid_attrs/types/{index}"), kind);
    }
    root.file(&format!("{port}/gid_attrs/ndevs/0"), "eth2\n");
    root.file("sys/class/net/eth2/mtu", "9000\n");
    root.file("sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN\n");
    let facts = root.read();
    assert_eq!(facts.verbs_devices, ["rdma_cm", "uverbs0"]);
    let [first, second] = facts.rdma_devices.as_slice() else {
        panic!("{facts:?}");
    };
    let port = &first.ports[0];
    assert!(port.is_active() && port.is_roce(), "{port:?}");
    assert_eq!(
        (port.interface.as_deref(), port.mtu_bytes),
        (Some("eth2"), Some(9000))
    );
    let gids: Vec<_> = port
        .gids
        .iter()
        .map(|gid| (gid.index, gid.kind.as_str()))
        .collect();
    assert_eq!(gids, [(0, "IB/RoCE v1"), (3, "RoCE v2"), (10, "RoCE v2")]);
    assert!(!second.ports[0].is_active());
}
