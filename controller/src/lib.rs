//! The controller of a Keystone Mesh.
