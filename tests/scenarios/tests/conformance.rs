//! Kubernetes' own tests of networking, on pods whose network is the mesh. A test program of its own: it is the longest.

mod play;

use play::play;

#[test]
fn pods_on_the_mesh_pass_what_kubernetes_asks_of_a_network() {
    if keystone_kubelab::can_test_conformance() {
        play(&["kubernetes-e2e"]);
    }
}
