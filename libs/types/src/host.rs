//! What a host offers for moving memory between nodes, as a process on it sees it.
//!
//! Facts only, and no judgement: what could not be found is `None` or empty. They travel between versions, so unknown
//! fields are ignored and absent ones take their defaults.
//!
//! Elsewhere: reading them (`node::host`), what they mean for transfers (`perigee check`).

use serde::{Deserialize, Serialize};

/// The host of a process.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFacts {
    /// The same for all processes of one running kernel, also across containers.
    pub boot_id: String,
    /// Number of the IPC namespace: System V shared memory is shared within one.
    pub ipc_namespace: Option<u64>,
    /// Most memory that the process may lock, in bytes; `None` is no limit. Registering for RDMA locks.
    pub memlock_bytes: Option<u64>,
    /// Whether the process holds `CAP_IPC_LOCK`, which lifts the limit.
    pub ipc_lock: bool,
    /// Size of `/dev/shm` in bytes, where it is mounted with one.
    pub shm_bytes: Option<u64>,
    /// Whether `/dev/shm` is mounted.
    pub shm_mounted: bool,
    /// Largest segment of System V shared memory, in bytes.
    pub shmmax_bytes: Option<u64>,
    /// Huge pages that nobody uses.
    pub huge_pages_free: u64,
    /// Size of one, in bytes.
    pub huge_page_bytes: u64,
    /// What is in `/dev/infiniband`: without `uverbs…` no process can use an adapter.
    pub verbs_devices: Vec<String>,
    /// RDMA adapters that the kernel has.
    pub rdma_devices: Vec<RdmaDevice>,
    /// The index of the GID that UCX is told to use (`UCX_IB_GID_INDEX`), where it is told.
    pub gid_index: Option<u32>,
}

/// An RDMA adapter.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RdmaDevice {
    /// Such as `mlx5_0`.
    pub name: String,
    /// Its ports.
    pub ports: Vec<RdmaPort>,
}

/// A port of an adapter.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RdmaPort {
    /// From 1.
    pub number: u32,
    /// Such as `ACTIVE` or `DOWN`.
    pub state: String,
    /// `InfiniBand` or `Ethernet`, which is RoCE.
    pub link_layer: String,
    /// Such as `100 Gb/sec (4X EDR)`.
    pub rate: String,
    /// The port's network interface, where it has one.
    pub interface: Option<String>,
    /// MTU of that interface, in bytes.
    pub mtu_bytes: Option<u32>,
    /// Its addresses; entries that are not set are left out.
    pub gids: Vec<RdmaGid>,
}

/// An address of a port.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RdmaGid {
    /// Place in the port's table.
    pub index: u32,
    /// Such as `fe80:0000:0000:0000:ba59:9fff:fe1a:2b3c`.
    pub gid: String,
    /// `RoCE v2` or `IB/RoCE v1`.
    pub kind: String,
}

impl HostFacts {
    /// Whether the process may lock `bytes` bytes.
    pub fn can_lock(&self, bytes: u64) -> bool {
        self.ipc_lock || self.memlock_bytes.is_none_or(|limit| limit >= bytes)
    }

    /// The ports that carry traffic, each with its adapter's name.
    pub fn active_ports(&self) -> impl Iterator<Item = (&str, &RdmaPort)> {
        self.rdma_devices.iter().flat_map(|device| {
            let active = device.ports.iter().filter(|port| port.is_active());
            active.map(|port| (device.name.as_str(), port))
        })
    }
}

impl RdmaPort {
    /// Whether it carries traffic.
    pub fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }

    /// Whether it is RDMA over Ethernet.
    pub fn is_roce(&self) -> bool {
        self.link_layer == "Ethernet"
    }
}
