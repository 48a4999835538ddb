//! The contract with the container runtime: CNI 1.1.0 and what older versions say differently.
//!
//! ```text
//!   environment ──▶ Call  (verb, container, interface, namespace)      ┐
//!   stdin       ──▶ Config (network, options, previous result)         ┘ parsed once, typed from here on
//!   stdout      ◀── Success in the version of the configuration, or Error with a code and a sentence
//! ```
//!
//! <https://www.cni.dev/docs/spec/>

mod call;
mod config;
mod error;
mod result;
mod version;

pub use call::{Call, Environment, Verb, check_interface_name};
pub use config::{Config, DEFAULT_DATA_DIR, Ipam, Mode, RuntimeConfig, ValidAttachment};
pub use error::{Code, Error, Result};
pub use result::{Dns, Interface, Ip, Route, Success};
pub use version::Version;
