//! The status listener of real daemons and a real relay: where it answers, where it does not, and that it says the truth.
//!
//! Every test has a sandbox of its own.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keystone_lab::mesh::{Node, Program, Route};
use keystone_lab::sandbox::in_own_world;
use keystone_lab::{Host, Wire, World, wait};
use keystone_mesh::quic::relay_server::RelaySnapshot;
use keystone_mesh::status::Status;

const KEYSTONE_MESH: &str = env!("CARGO_BIN_EXE_keystone-mesh");
/// For what should take no time at all on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
const POLL: Duration = Duration::from_millis(50);
/// Where status is served in these tests.
const PORT: u16 = 51842;

#[test]
fn status_is_served_on_loopback_and_mesh_addresses_and_nowhere_else() {
    in_world("status_is_served_on_loopback_and_mesh_addresses_and_nowhere_else", |world| {
        let (home, worker) = (control_plane(world)?, node(world, "worker")?);
        for address in [Ipv4Addr::LOCALHOST.into(), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])] {
            let ready = wait::until("home is ready", PATIENCE, POLL, || {
                Ok(get(home.host(), address, "/readyz").ok().filter(|(code, _)| *code == 200))
            })?;
            ensure!(ready.1 == "ready\n", "{address}: {ready:?}");
        }
        worker.up_with_token(&home.create_token(1)?)?;
        worker.wait_for_path("home", Route::Direct, PATIENCE)?;

        let through_the_mesh = home.mesh_v4()?.into();
        // What was asked for a moment ago is served again for a second.
        wait::until("home's page shows the worker through the mesh", PATIENCE, POLL, || {
            let (code, peers) = get(worker.host(), through_the_mesh, "/v1/peers")?;
            let peers: serde_json::Value = serde_json::from_str(&peers)?;
            ensure!(code == 200 && peers["node"] == "home", "{code} {peers}");
            Ok((peers["peers"][0]["name"] == "worker").then_some(()))
        })?;
        let public = get(worker.host(), home.host().v4().into(), "/healthz");
        ensure!(public.is_err(), "the public address answers: {public:?}");
        Ok(())
    });
}

#[test]
fn pages_say_what_the_commands_say() {
    in_world("pages_say_what_the_commands_say", |world| {
        let (home, worker) = (control_plane(world)?, node(world, "worker")?);
        worker.up_with_token(&home.create_token(1)?)?;
        home.wait_for_path("worker", Route::Direct, PATIENCE)?;

        let page = wait::until("the page knows the direct path", PATIENCE, POLL, || {
            let (_, text) = get(home.host(), Ipv4Addr::LOCALHOST.into(), "/v1/status")?;
            let status: Status = serde_json::from_str(&text)?;
            Ok(status.peers.iter().any(|peer| peer.path == "direct").then_some(text))
        })?;
        let command = home.host().run(command(&home).args(["status", "--json"]))?;
        let shape = |text: &str| -> Result<Vec<String>> { Ok(keys(&serde_json::from_str(text)?, String::new())) };
        ensure!(shape(&page)? == shape(&command)?, "one shape:\n{page}\n{command}");

        let (_, metrics) = get(home.host(), Ipv4Addr::LOCALHOST.into(), "/metrics")?;
        for sample in [
            "keystone_mesh_ready 1.0",
            "keystone_mesh_approval{state=\"approved\"} 1.0",
            "keystone_mesh_peers{path=\"direct\"} 1.0",
            "keystone_mesh_peer_path{peer=\"worker\",path=\"direct\"} 1.0",
            "keystone_mesh_registry_up{kind=\"embedded\"} 1.0",
        ] {
            ensure!(metrics.lines().any(|line| line == sample), "{sample} is missing:\n{metrics}");
        }
        for counter in ["handshakes_completed", "path_changes", "probes_sent", "probes_received", "sent_bytes"] {
            ensure!(value(&metrics, &format!("keystone_mesh_{counter}_total"))? > 0.0, "{counter}:\n{metrics}");
        }
        ensure!(value(&metrics, "process_resident_memory_bytes")? > 1e6, "{metrics}");
        Ok(())
    });
}

#[test]
fn what_somebody_takes_from_the_kernel_is_put_back_and_counted() {
    in_world("what_somebody_takes_from_the_kernel_is_put_back_and_counted", |world| {
        let (home, worker) = (control_plane(world)?, node(world, "worker")?);
        worker.up_with_token(&home.create_token(1)?)?;
        home.wait_for_path("worker", Route::Direct, PATIENCE)?;
        let repairs = || {
            let (_, metrics) = get(home.host(), Ipv4Addr::LOCALHOST.into(), "/metrics")?;
            value(&metrics, "keystone_mesh_kernel_repairs_total")
        };
        let gone = format!("{}/32", worker.mesh_v4()?);
        // The path may be there a moment before the route is.
        wait::until("the route is there, and gone", PATIENCE, POLL, || {
            ensure!(repairs()? == 0.0, "what the daemon does itself is no repair");
            Ok(home.host().run(Command::new("ip").args(["route", "del", &gone, "table", "5184"])).ok())
        })?;
        wait::until("the repair is counted", PATIENCE, POLL, || Ok((repairs()? == 1.0).then_some(())))?;
        Ok(())
    });
}

#[test]
fn a_relay_alone_serves_its_counters() {
    in_world("a_relay_alone_serves_its_counters", |world| {
        let home = node(world, "home")?;
        let network = home.init()?;
        let relay = node(world, "relay")?;
        // Before it runs: this makes its key.
        let address = relay.relay_address(&network)?;
        let mut run = command(&relay);
        run.args(["relay", "--network", &network, "--status-listen", &PORT.to_string()]);
        let _relay = relay.host().spawn("relay", &mut run)?;
        home.up(&["--relay", &address])?;
        let loopback = Ipv4Addr::LOCALHOST.into();
        let counted = wait::until("the control plane is a client", PATIENCE, POLL, || {
            let Ok((200, text)) = get(relay.host(), loopback, "/v1/status") else { return Ok(None) };
            let counted: RelaySnapshot = serde_json::from_str(&text)?;
            Ok((counted.clients == 1).then_some(counted))
        })?;
        ensure!(counted.admitted == [1, 0, 0], "{counted:?}");
        let (_, metrics) = get(relay.host(), loopback, "/metrics")?;
        ensure!(metrics.contains("keystone_relay_admitted_total{role=\"network\"} 1.0\n"), "{metrics}");
        Ok(())
    });
}

fn in_world(name: &str, test: impl FnOnce(&World) -> Result<()>) {
    in_own_world(name, || test(&World::new(Wire::Offloaded)?));
}

fn node(world: &World, name: &str) -> Result<Node> {
    Node::new(&Program::find(Some(KEYSTONE_MESH.into()))?, &world.public_host(name)?, name)
}

/// A control plane that can be reached and serves status.
fn control_plane(world: &World) -> Result<Node> {
    let home = node(world, "home")?;
    home.init()?;
    let gateway = format!("{}:51840", home.host().v4());
    home.up(&["--gateway", &gateway, "--status-listen", &PORT.to_string()])?;
    home.wait_until("is ready", PATIENCE, |_| true)?;
    Ok(home)
}

fn command(node: &Node) -> Command {
    let mut command = Command::new(KEYSTONE_MESH);
    command.envs(node.environment().into_iter().filter(|(key, _)| *key != "PATH"));
    command
}

/// Asks for a page from a host; the code and the body.
fn get(from: &Host, at: IpAddr, page: &str) -> Result<(u16, String)> {
    from.enter(|| {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(at, PORT), Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(format!("GET {page} HTTP/1.1\r\nHost: {at}\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no end of the head")?;
        let code = head.split(' ').nth(1).context("no status line")?.parse()?;
        Ok((code, body.to_owned()))
    })
}

fn value(metrics: &str, name: &str) -> Result<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("{name} is missing"))?.parse()?)
}

/// The paths of every field.
fn keys(value: &serde_json::Value, path: String) -> Vec<String> {
    match value {
        serde_json::Value::Object(fields) => {
            fields.iter().flat_map(|(key, value)| keys(value, format!("{path}.{key}"))).collect()
        }
        serde_json::Value::Array(items) => {
            items.first().map_or_else(|| vec![path.clone()], |item| keys(item, format!("{path}[]")))
        }
        serde_json::Value::Null
        | serde_json::Value::Bool(_)
        | serde_json::Value::Number(_)
        | serde_json::Value::String(_) => vec![path],
    }
}
