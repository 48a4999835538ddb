//! What people set, by flags.

use ipnet::IpNet;

/// Who approves a Node's first record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Only a Member of the same identity: made by a join with a token, or by a person (`keystone-mesh approve`).
    #[default]
    Member,
    /// Besides, the first record of every Node is approved, and its identity pinned.
    Auto,
}

/// What people set, by flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who approves a Node's first record.
    pub policy: Policy,
    /// Networks that any Node may be the way to when it (`routes-wanted`) or a person (`routes-extra`) asks.
    pub allowed_routes: Vec<IpNet>,
    /// Networks inside which `spec.podCIDRs` must be; empty: anywhere.
    pub pod_cidrs: Vec<IpNet>,
    /// Whether to initialise Nodes: provider ID, topology labels, addresses, the cloud provider's taint. For clusters
    /// whose cloud controller is off.
    pub node_init: bool,
    /// Whether to put the startup taint on fresh Nodes. Lifting it is always done.
    pub startup_taint: bool,
    /// A Node gets the startup taint only up to this age, in milliseconds.
    pub fresh: u64,
    /// How long a Node has to be out of reach before `MeshReady` turns False, in milliseconds.
    pub unready_after: u64,
    /// How long a Node that was out of reach has to be reached before `MeshReady` turns True again, in milliseconds.
    pub ready_after: u64,
    /// How long a report counts, in milliseconds; without any, `MeshReady` turns Unknown.
    pub report_life: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            allowed_routes: Vec::new(),
            pod_cidrs: Vec::new(),
            node_init: false,
            startup_taint: true,
            fresh: 10 * 60_000,
            // A node controller calls a silent kubelet unready after 40 s; the mesh should not be quicker to judge.
            unready_after: 40_000,
            ready_after: 10_000,
            report_life: 180_000,
        }
    }
}
