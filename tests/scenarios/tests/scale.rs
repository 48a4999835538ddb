//! Many nodes on one API server. A test program of its own, so that nothing else runs beside it.

mod play;

use play::play;

#[test]
fn an_idle_cluster_is_silent_and_a_change_is_everywhere_soon() {
    if keystone_kubelab::can_test() {
        play(&["kubernetes-scale", "--minutes", "2", "--daemons", "50", "--nodes", "1000", "--watches", "100"]);
    }
}
