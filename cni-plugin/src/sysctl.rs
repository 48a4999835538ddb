//! The few kernel settings that pods need, in `/proc/sys/net`.
//!
//! Each is read first and written only where it differs. So a read-only `/proc/sys`, as in some containers, is no obstacle
//! where the values are right already, and the error names the setting where they are not.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::plan::Family;

/// Where the kernel shows its settings.
const ROOT: &str = "/proc/sys/net";

/// Lets this host forward packets of a family between its interfaces.
pub(crate) fn forward(family: Family) -> io::Result<()> {
    match family {
        Family::V4 => ensure(Path::new(ROOT), "ipv4/ip_forward", "1"),
        Family::V6 => forward_ipv6(Path::new(ROOT)),
    }
}

/// Lets an interface of the calling thread's namespace have IPv6. A kernel without IPv6 has no such setting; the step that
/// gives the address says so.
pub(crate) fn allow_ipv6(interface: &str) -> io::Result<()> {
    let setting = format!("ipv6/conf/{interface}/disable_ipv6");
    match ensure(Path::new(ROOT), &setting, "0") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// A host that forwards IPv6 stops to listen to router advertisements on interfaces where it accepts them as an end system
/// does (`accept_ra` 1, ip-sysctl.rst), and would lose its own default route. Those are told to listen nevertheless (2).
fn forward_ipv6(root: &Path) -> io::Result<()> {
    const SETTING: &str = "ipv6/conf/all/forwarding";
    if read(&root.join(SETTING))? == "1" {
        return Ok(());
    }
    let interfaces =
        fs::read_dir(root.join("ipv6/conf")).map(|list| list.flatten().collect()).unwrap_or_else(|_| Vec::new());
    for interface in interfaces {
        let accept = interface.path().join("accept_ra");
        if read(&accept).is_ok_and(|value| value == "1") {
            write(&accept, "2")?;
        }
    }
    ensure(root, SETTING, "1")
}

fn ensure(root: &Path, setting: &str, wanted: &str) -> io::Result<()> {
    let path = root.join(setting);
    if read(&path)? == wanted { Ok(()) } else { write(&path, wanted) }
}

fn read(path: &Path) -> io::Result<String> {
    fs::read_to_string(path)
        .map(|value| value.trim_end().to_owned())
        .map_err(|error| explained(path, "cannot be read", &error))
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::write(path, value).map_err(|error| explained(path, &format!("has to be {value} and cannot be written"), &error))
}

fn explained(path: &Path, what: &str, error: &io::Error) -> io::Error {
    let path: PathBuf = path.into();
    io::Error::new(
        error.kind(),
        format!("{} {what}: {error}; set it on the host, with sysctl.d for example", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(settings: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (setting, value) in settings {
            let path = root.path().join(setting);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        root
    }

    #[test]
    fn a_setting_that_is_right_is_not_written() {
        let root = tree(&[("ipv4/ip_forward", "1")]);
        let path = root.path().join("ipv4/ip_forward");
        let before = fs::metadata(&path).unwrap().modified().unwrap();
        ensure(root.path(), "ipv4/ip_forward", "1").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
        ensure(root.path(), "ipv4/ip_forward", "0").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "0");
    }

    #[test]
    fn a_host_that_learns_its_route_from_advertisements_goes_on_to_listen() {
        let root = tree(&[
            ("ipv6/conf/all/forwarding", "0"),
            ("ipv6/conf/eth0/accept_ra", "1"),
            ("ipv6/conf/eth1/accept_ra", "0"),
        ]);
        forward_ipv6(root.path()).unwrap();
        let value = |setting: &str| fs::read_to_string(root.path().join(setting)).unwrap().trim_end().to_owned();
        assert_eq!(value("ipv6/conf/all/forwarding"), "1");
        assert_eq!(value("ipv6/conf/eth0/accept_ra"), "2");
        assert_eq!(value("ipv6/conf/eth1/accept_ra"), "0");
    }

    #[test]
    fn a_setting_that_cannot_be_read_is_named() {
        let error = ensure(Path::new("/nonexistent"), "ipv4/ip_forward", "1").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ipv4/ip_forward"), "{error}");
    }
}
