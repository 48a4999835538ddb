//! The environment of a call: which verb, for which container.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use super::{Code, Error, Result};

/// IFNAMSIZ of linux/if.h without its final zero.
const MAX_INTERFACE_NAME: usize = 15;

/// Container IDs are 64 hexadecimal digits; a lease has to fit into the target of a symbolic link (4,095 bytes).
const MAX_CONTAINER_ID: usize = 1024;

/// What the runtime wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Give the container an interface.
    Add,
    /// Take it away.
    Del,
    /// Say whether it is as ADD left it.
    Check,
    /// Remove what belongs to no container that is named.
    Gc,
    /// Say whether ADD could succeed.
    Status,
    /// Name the versions that are spoken.
    Version,
}

impl Verb {
    fn parse(text: &str) -> Result<Self> {
        match text {
            "ADD" => Ok(Self::Add),
            "DEL" => Ok(Self::Del),
            "CHECK" => Ok(Self::Check),
            "GC" => Ok(Self::Gc),
            "STATUS" => Ok(Self::Status),
            "VERSION" => Ok(Self::Version),
            other => Err(environment(format!(
                "CNI_COMMAND is {other:?}: it has to be ADD, DEL, CHECK, GC, STATUS or VERSION"
            ))),
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        })
    }
}

/// Where variables come from: the process in the program, a list in tests.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The `CNI_*` variables of one call, each checked as far as its verb needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `CNI_COMMAND`.
    pub verb: Verb,
    /// `CNI_CONTAINERID`; empty for GC, STATUS and VERSION.
    pub container: String,
    /// `CNI_IFNAME`; empty for GC, STATUS and VERSION.
    pub ifname: String,
    /// `CNI_NETNS`; DEL may come without it.
    pub netns: Option<PathBuf>,
    /// `CNI_PATH`: where delegated plugins are looked for.
    pub path: Vec<PathBuf>,
    /// Namespace and name of the pod, where the runtime told them in `CNI_ARGS`.
    pub pod: Option<String>,
}

impl Call {
    /// Reads and checks the environment.
    pub fn parse(environment: Environment<'_>) -> Result<Self> {
        let variable = |name: &str| text(environment, name);
        let command = variable("CNI_COMMAND")?.ok_or_else(|| {
            self::environment(
                "CNI_COMMAND is not set: this program is called by a container runtime; try `keystone-cni --help`"
                    .into(),
            )
        })?;
        let verb = Verb::parse(&command)?;
        let path = variable("CNI_PATH")?.unwrap_or_default();
        let mut call = Self {
            verb,
            container: String::new(),
            ifname: String::new(),
            netns: None,
            path: path.split(':').filter(|directory| directory.starts_with('/')).map(PathBuf::from).collect(),
            pod: None,
        };
        match verb {
            Verb::Version | Verb::Gc | Verb::Status => return Ok(call),
            Verb::Add | Verb::Del | Verb::Check => {}
        }
        call.container = needed(variable("CNI_CONTAINERID")?, verb, "CNI_CONTAINERID")?;
        check_container(&call.container)?;
        call.ifname = needed(variable("CNI_IFNAME")?, verb, "CNI_IFNAME")?;
        check_interface_name("CNI_IFNAME", &call.ifname)?;
        call.netns = match variable("CNI_NETNS")?.filter(|path| !path.is_empty()) {
            None if verb == Verb::Del => None,
            path => Some(check_netns(needed(path, verb, "CNI_NETNS")?)?),
        };
        call.pod = variable("CNI_ARGS")?.as_deref().and_then(pod_of);
        Ok(call)
    }
}

fn text(environment: Environment<'_>, name: &str) -> Result<Option<String>> {
    let Some(value) = environment(name) else { return Ok(None) };
    value.into_string().map(Some).map_err(|value| self::environment(format!("{name} is {value:?}, which is no UTF-8")))
}

fn needed(value: Option<String>, verb: Verb, name: &str) -> Result<String> {
    value
        .filter(|value| !value.is_empty())
        .ok_or_else(|| environment(format!("{name} is not set, and {verb} needs it")))
}

/// The specification's form. It keeps path separators, blanks and everything with a meaning elsewhere out.
fn check_container(id: &str) -> Result<()> {
    if id.len() > MAX_CONTAINER_ID {
        return Err(environment(format!(
            "CNI_CONTAINERID has {} bytes, at most {MAX_CONTAINER_ID} are allowed",
            id.len()
        )));
    }
    if !super::config::is_name(id) {
        return Err(environment(format!(
            "CNI_CONTAINERID is {id:?}: it has to begin with a letter or digit and go on with those or `_`, `.`, `-`"
        )));
    }
    Ok(())
}

/// What the kernel takes as the name of an interface (`dev_valid_name`), and printable ASCII only. `what` is named in the
/// error.
pub fn check_interface_name(what: &str, name: &str) -> Result<()> {
    let fault = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_INTERFACE_NAME {
        "an interface's name has 15 characters at most"
    } else if name == "." || name == ".." {
        "this is no name of an interface"
    } else if !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':') {
        "an interface's name has printable ASCII characters, but no blank, `/` or `:`"
    } else {
        return Ok(());
    };
    Err(environment(format!("{what} is {name:?}: {fault}")))
}

fn check_netns(path: String) -> Result<PathBuf> {
    if path.starts_with('/') {
        Ok(path.into())
    } else {
        Err(environment(format!("CNI_NETNS is {path:?}: it has to be an absolute path")))
    }
}

/// `NAMESPACE/NAME` of the pod, from arguments as kubelets' runtimes give them. Only for lists that people read, so
/// anything unusual is left out and no error.
fn pod_of(arguments: &str) -> Option<String> {
    let value = |key: &str| {
        let pair = arguments.split(';').find_map(|pair| pair.split_once('=').filter(|(name, _)| *name == key));
        pair.map(|(_, value)| value).filter(|value| super::config::is_name(value) && value.len() <= 253)
    };
    Some(format!("{}/{}", value("K8S_POD_NAMESPACE")?, value("K8S_POD_NAME")?))
}

fn environment(message: String) -> Error {
    Error::new(Code::InvalidEnvironment, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Call> {
        let lookup =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
        Call::parse(&lookup)
    }

    fn add_with(name: &'static str, value: &'static str) -> Result<Call> {
        let mut variables = vec![
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/c1"),
            ("CNI_PATH", "/opt/cni/bin:relative::/usr/lib/cni"),
        ];
        variables.retain(|(key, _)| *key != name);
        variables.push((name, value));
        parse(&variables)
    }

    #[test]
    fn a_whole_environment_becomes_a_call() {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=1";
        let call = add_with("CNI_ARGS", args).unwrap();
        assert_eq!((call.verb, call.container.as_str(), call.ifname.as_str()), (Verb::Add, "c1", "eth0"));
        assert_eq!(call.path, [PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")]);
        assert_eq!(call.pod.as_deref(), Some("default/web-0"));
    }

    #[test]
    fn hostile_names_are_refused_with_the_variable_named() {
        for (name, value) in [
            ("CNI_CONTAINERID", "../../etc/passwd"),
            ("CNI_CONTAINERID", "a b"),
            ("CNI_CONTAINERID", "a\"; flush ruleset"),
            ("CNI_CONTAINERID", "-a"),
            ("CNI_CONTAINERID", ""),
            ("CNI_IFNAME", "abcdefghijklmnop"),
            ("CNI_IFNAME", "../eth0"),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "eth0 up"),
            ("CNI_IFNAME", "eth:0"),
            ("CNI_IFNAME", "eth\n0"),
            ("CNI_NETNS", "run/netns/c1"),
            ("CNI_NETNS", ""),
            ("CNI_COMMAND", "add"),
        ] {
            let error = add_with(name, value).unwrap_err();
            assert!(error.is(Code::InvalidEnvironment) && error.message.contains(name), "{name}={value:?}: {error}");
        }
        let long = "a".repeat(MAX_CONTAINER_ID + 1);
        let error = add_with("CNI_CONTAINERID", long.leak()).unwrap_err();
        assert!(error.message.len() < 200, "{error}");
    }

    #[test]
    fn del_comes_without_a_namespace_and_the_verbs_of_a_node_without_a_container() {
        let del = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")];
        assert_eq!(parse(&del).unwrap().netns, None);
        for verb in ["GC", "STATUS", "VERSION"] {
            assert!(parse(&[("CNI_COMMAND", verb)]).is_ok());
        }
        assert!(parse(&[]).unwrap_err().message.contains("CNI_COMMAND is not set"));
    }

    #[test]
    fn a_pod_with_an_odd_name_is_left_out_of_the_list() {
        assert_eq!(pod_of("K8S_POD_NAMESPACE=a;K8S_POD_NAME=b c"), None);
        assert_eq!(pod_of("K8S_POD_NAMESPACE=a"), None);
    }
}
