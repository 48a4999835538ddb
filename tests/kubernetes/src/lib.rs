//! A real Kubernetes for tests: nothing is mocked, everything runs in network namespaces and ends with the test.
//!
//! ```text
//!   sandbox (keystone-lab)
//!     ├─ etcd            127.0.0.1:2379, data on the sandbox's tmpfs
//!     ├─ kube-apiserver  :6443, Node and RBAC authorization, a certificate authority of its own
//!     └─ the test        speaks with it as whoever it likes: a person, a node, a ServiceAccount bound to a node
//! ```
//!
//! One test, one API server, in a sandbox of its own; so the ports are always the same, tests never meet, and nothing
//! stays behind. It is ready after some seconds, which is why a test here should show more than one thing:
//!
//! ```no_run
//! # use keystone_kubelab::{Options, with_api_server};
//! #[test]
//! fn nodes_can_be_listed() {
//!     with_api_server("nodes_can_be_listed", Options::default(), |server| {
//!         server.apply(r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}}"#)?;
//!         assert_eq!(server.kubectl(&["get", "nodes", "--output", "name"])?, "node/a\n");
//!         Ok(())
//!     });
//! }
//! ```
//!
//! `cargo test` runs as many of them at once as the machine has cores; each takes about 500 MB of memory.

#![forbid(unsafe_code)]

mod access;
mod api_server;
mod assets;
mod cgroup;
mod conformance;
mod dns;
mod etcd;
mod fleet;
mod image;
mod metrics;
mod node;
mod pki;
mod test_images;
mod usage;
mod watchers;

pub use access::Access;
pub use api_server::{ApiServer, Options, PORT};
pub use assets::{Assets, NODE_TOOLS, TEST_TOOLS, can_test, can_test_cluster, can_test_conformance};
pub use cgroup::sweep;
pub use conformance::{Selection, Spec, State};
pub use dns::Dns;
pub use fleet::Fleet;
pub use image::{BUSYBOX, Image};
pub use metrics::{Metrics, Sample};
pub use node::{ClusterNode, NodeOptions};
pub use test_images::{AGNHOST, write_test_images};
pub use usage::Usage;
pub use watchers::Watchers;

use keystone_lab::sandbox;

/// Runs `test` with an API server of its own, on the loopback of a sandbox of its own, and panics if it fails. Where that
/// cannot be done the test is skipped, and says so; in CI it fails.
///
/// `name` is the test's path as the test program lists it, as for [`sandbox::in_own_world`].
pub fn with_api_server(name: &str, options: Options, test: impl FnOnce(&mut ApiServer) -> anyhow::Result<()>) {
    if sandbox::is_inside() || can_test() {
        sandbox::in_own_world(name, || test(&mut ApiServer::start(options)?));
    }
}

/// Runs `test`, which makes its own [`World`](keystone_lab::World), [`ApiServer`] and [`ClusterNode`]s, in a sandbox of its
/// own, and panics if it fails. Where containers cannot be run the test is skipped, and says so; in CI it fails.
pub fn in_own_cluster(name: &str, test: impl FnOnce() -> anyhow::Result<()>) {
    /// Also after a failed test.
    struct Sweeper;

    impl Drop for Sweeper {
        fn drop(&mut self) {
            sweep();
        }
    }

    if sandbox::is_inside() {
        sandbox::in_own_world(name, test);
    } else if can_test_cluster() {
        let _sweeper = Sweeper;
        sandbox::in_own_world(name, test);
    }
}
