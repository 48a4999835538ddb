//! Traffic between hosts: echoes and streams.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::host::{DEADLINE, Node};

/// Answers UDP datagrams at a port of the node for as long as the test runs.
pub(crate) fn serve_echo(node: &Node, port: u16) {
    let addresses = [false, true].map(|v6| SocketAddr::new(node.mesh_address(v6), port));
    for address in addresses {
        // Bound in the host, and answering from a thread that ends with the process.
        let socket = node.host.run(move || UdpSocket::bind(address).unwrap());
        std::thread::spawn(move || {
            let mut buffer = [0; 65535];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                // Fails where the way back is not up yet; the sender asks again.
                let _ = socket.send_to(&buffer[..len], from);
            }
        });
    }
}

/// Sends datagrams to an echo until one comes back, and says how long it took.
pub(crate) fn ping(from: &Node, to: IpAddr, port: u16) -> Duration {
    let source = SocketAddr::new(from.mesh_address(to.is_ipv6()), 0);
    from.host.run(move || {
        let socket = UdpSocket::bind(source).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let start = Instant::now();
        for attempt in 0u32.. {
            let payload = [&attempt.to_be_bytes()[..], &[7; 500]].concat();
            // Fails while the interface is being made.
            let _ = socket.send_to(&payload, (to, port));
            let mut buffer = [0; 2000];
            if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                assert_eq!((len, from.ip()), (504, to));
                return start.elapsed();
            }
            assert!(start.elapsed() < DEADLINE, "no answer from {to}");
        }
        unreachable!("the loop ends by its deadline")
    })
}

/// Sends one datagram and waits for its echo; no second attempt.
pub(crate) fn ping_once(from: &Node, to: IpAddr, port: u16) -> Option<Duration> {
    let source = SocketAddr::new(from.mesh_address(to.is_ipv6()), 0);
    from.host.run(move || {
        let socket = UdpSocket::bind(source).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let start = Instant::now();
        socket.send_to(&[9; 100], (to, port)).unwrap();
        socket.recv_from(&mut [0; 2000]).ok().map(|_| start.elapsed())
    })
}

/// Sends `len` bytes over TCP and checks what arrives.
pub(crate) fn stream(from: &Node, to: &Node, v6: bool, len: usize) {
    let address = SocketAddr::new(to.mesh_address(v6), 0);
    let listener = to.host.run(move || TcpListener::bind(address).unwrap());
    let address = listener.local_addr().unwrap();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let data = pattern(len);
    let sent = data.clone();
    from.host.run(move || {
        let mut stream = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
        stream.write_all(&sent).unwrap();
    });
    let received = receiver.join().unwrap();
    assert_eq!(received.len(), data.len());
    assert!(received == data, "the content differs");
}

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .collect()
}
