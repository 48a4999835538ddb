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
pub use config::{Config, DEFAULT_DATA_DIR, Ipam, KEYS, Key, Mode, RuntimeConfig, ValidAttachment};
pub use error::{Code, Error, Result};
pub use result::{Dns, Interface, Ip, Route, Success};
pub use version::Version;

#[cfg(test)]
mod tests {
    use super::*;

    const DOC: &str = include_str!("../../docs/cni.md");

    /// What stands between the marks of a section.
    fn section(name: &str) -> &'static str {
        let (_, rest) = DOC.split_once(&format!("<!-- {name}: begin -->\n")).expect("the section begins");
        rest.split_once(&format!("<!-- {name}: end -->")).expect("the section ends").0
    }

    #[test]
    fn the_page_in_docs_has_every_key_and_every_code() {
        let mut keys = "| key | default | meaning |\n| --- | --- | --- |\n".to_owned();
        for Key { name, default, meaning } in KEYS {
            let default = if default.is_empty() { " ".to_owned() } else { format!(" {default} ") };
            keys.push_str(&format!("| `{name}` |{default}| {meaning} |\n"));
        }
        assert_eq!(section("keys"), keys, "docs/cni.md, section keys, should be:\n{keys}");
        let mut codes = "| code | meaning | remedy |\n| --- | --- | --- |\n".to_owned();
        for code in Code::ALL {
            let (meaning, remedy) = code.meaning();
            codes.push_str(&format!("| {} | {meaning} | {remedy} |\n", code as u32));
        }
        assert_eq!(section("codes"), codes, "docs/cni.md, section codes, should be:\n{codes}");
    }
}
