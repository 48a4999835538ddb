//! The CNI plugin of Keystone Mesh: gives pods their network.

pub mod facts;
