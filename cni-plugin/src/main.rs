//! `keystone-cni`: called by the container runtime, once for each verb.

fn main() {}
