//! Stops, kills and leaving: what stays and what goes.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keystone_lab::Host;
use keystone_lab::mesh::Route;

use crate::kernel::{ip, state};
use crate::stage::{INSIDE, PATIENCE, both_reply};
use crate::{control_plane, in_world, state_of, talking_pair, worker};

/// How long an established connection may stand still over a kill and a restart: TCP's own waiting (RFC 6298) included,
/// and a machine that does other things.
const STANDSTILL: Duration = Duration::from_secs(10);

#[test]
fn a_stop_is_clean_and_keeps_or_removes_the_interface_as_configured() {
    in_world("life::a_stop_is_clean_and_keeps_or_removes_the_interface_as_configured", |world| {
        let (mut pair, pings) = talking_pair(world)?;
        let (host, interface) = (pair.ours.host().clone(), pair.ours.interface().to_owned());
        let ended = pair.ours.stop()?.context("it ran")?;
        ensure!(ended.success(), "SIGTERM is a clean stop: {ended}");
        let kept = state(&host, &interface)?;
        ensure!(kept.contains("10.77.0.1") && kept.contains("10.77.0.2"), "addresses and routes stay: {kept}");
        ensure!(!host.folder()?.join("run/control.sock").exists(), "the socket is gone");

        pair.ours.start()?;
        both_reply(&pings, Instant::now(), PATIENCE)?;
        pair.ours.stop()?;
        let config = host.folder()?.join("config.toml");
        let mut command = std::process::Command::new(crate::KEYSTONE_MESH);
        command.args(["up", "--on-stop", "remove", "--config"]).arg(config);
        command.arg("--state-dir").arg(host.folder()?.join("state")).arg("--run-dir").arg(host.folder()?.join("run"));
        let daemon = host.spawn("removing", &mut command)?;
        both_reply(&pings, Instant::now(), PATIENCE)?;
        let ended = daemon.terminate(PATIENCE)?;
        ensure!(ended.success(), "SIGTERM is a clean stop: {ended}");
        let left = state(&host, &interface)?;
        ensure!(left.is_empty(), "everything is gone, but:\n{left}");
        Ok(())
    });
}

#[test]
fn connections_to_a_plain_peer_survive_kills_and_restarts() {
    in_world("life::connections_to_a_plain_peer_survive_kills_and_restarts", |world| {
        let (mut pair, _pings) = talking_pair(world)?;
        let echo = Echo::start(pair.other.host(), pair.ours.host(), SocketAddr::from((INSIDE[1].0, 7007)))?;
        for _ in 0..3 {
            echo.wait_for_beats(20)?;
            pair.ours.kill()?;
            let killed = Instant::now();
            let whole = state(pair.ours.host(), pair.ours.interface())?;
            ensure!(whole.contains("10.77.0.1") && whole.contains("10.77.0.2"), "all stays: {whole}");
            pair.ours.start()?;
            println!("killed and restarted, TCP stood still for {:.0} ms", millis(echo.gap_since(killed)?));
        }
        Ok(())
    });
}

#[test]
fn connections_between_members_survive_kills_and_restarts() {
    in_world("life::connections_between_members_survive_kills_and_restarts", |world| {
        let home = control_plane(world)?;
        let member = worker(world, &home, "member")?;
        home.wait_for_path("member", Route::Direct, PATIENCE)?;
        let echo = Echo::start(home.host(), member.host(), SocketAddr::from((home.mesh_v4()?, 7007)))?;
        for node in [&member, &home, &member, &home] {
            echo.wait_for_beats(20)?;
            node.kill()?;
            let killed = Instant::now();
            node.up(&[])?;
            let gap = echo.gap_since(killed).with_context(|| format!("{}:\n{}", node.name(), node.log_tail(20)))?;
            println!("{} killed and restarted, TCP stood still for {:.0} ms", node.name(), millis(gap));
        }
        Ok(())
    });
}

#[test]
fn who_leaves_takes_everything_along() {
    in_world("life::who_leaves_takes_everything_along", |world| {
        let home = control_plane(world)?;
        let worker = worker(world, &home, "worker")?;
        home.wait_for_path("worker", Route::Direct, PATIENCE)?;
        let interface = worker.status()?.node.interface;
        ensure!(!state(worker.host(), &interface)?.is_empty(), "there is something to take along");

        worker.leave()?;
        let left = state(worker.host(), &interface)?;
        ensure!(left.is_empty(), "interface, addresses, routes and rules are gone, but:\n{left}");
        for file in ["secret", "membership", "snapshot"] {
            ensure!(!state_of(&worker).join(file).exists(), "{file} is gone");
        }
        home.wait_until("forgets the worker", PATIENCE, |status| status.peer("worker").is_none())?;
        let routes = ip(home.host(), "-4 route show table 5184")?;
        println!("home's routes afterwards: {}", routes.trim());
        Ok(())
    });
}

/// A TCP connection over which a byte goes there and back all the time.
struct Echo {
    beats: mpsc::Receiver<io::Result<Instant>>,
}

impl Echo {
    fn start(server: &Host, client: &Host, address: SocketAddr) -> Result<Self> {
        let listener = server.enter(|| TcpListener::bind(address)).context("listen inside")?;
        thread::spawn(move || -> io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let mut byte = [0];
            loop {
                stream.read_exact(&mut byte)?;
                stream.write_all(&byte)?;
            }
        });
        let stream = client.enter(|| TcpStream::connect_timeout(&address, PATIENCE)).context("connect inside")?;
        stream.set_nodelay(true)?;
        let (tell, beats) = mpsc::channel();
        thread::spawn(move || {
            loop {
                let beat = beat(&stream);
                let failed = beat.is_err();
                if tell.send(beat).is_err() || failed {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
        Ok(Self { beats })
    }

    fn wait_for_beats(&self, count: usize) -> Result<()> {
        while self.beats.try_recv().is_ok() {}
        for _ in 0..count {
            self.beats.recv_timeout(STANDSTILL).context("the connection stands still")?.context("it broke")?;
        }
        Ok(())
    }

    /// The longest time without a beat around `moment`, once ten have come after it.
    fn gap_since(&self, moment: Instant) -> Result<Duration> {
        let (mut after, mut last, mut longest) = (0, moment, Duration::ZERO);
        while after < 10 {
            let beat = self.beats.recv_timeout(STANDSTILL).context("the connection stands still")?;
            let beat = beat.context("the connection broke")?;
            if beat > moment {
                after += 1;
                longest = longest.max(beat.duration_since(last));
                last = beat;
            }
        }
        Ok(longest)
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn beat(mut stream: &TcpStream) -> io::Result<Instant> {
    stream.write_all(&[42])?;
    stream.read_exact(&mut [0])?;
    Ok(Instant::now())
}
