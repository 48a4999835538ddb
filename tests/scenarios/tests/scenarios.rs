//! The scenarios, played by the real daemon: what they show must be so.

mod play;

use play::play;

#[test]
fn home_and_cloud_become_one_network() {
    play(&["home-and-cloud"]);
}

#[test]
fn machines_join_one_after_another() {
    play(&["joins", "--count", "3"]);
}

#[test]
fn an_outage_of_home_and_relay_leaves_what_is_established() {
    play(&["outage", "--minutes", "0.5"]);
}

#[test]
fn a_cluster_spans_a_home_and_clouds() {
    if keystone_kubelab::can_test_cluster() {
        play(&["kubernetes"]);
    }
}

#[test]
fn an_outage_of_the_api_server_leaves_the_mesh_as_it_is() {
    if keystone_kubelab::can_test() {
        play(&["kubernetes-outage", "--minutes", "0.5"]);
    }
}
