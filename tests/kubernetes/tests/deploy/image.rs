//! The image: built without a registry, and run by a real containerd.
