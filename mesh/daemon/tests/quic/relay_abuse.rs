//! What a relay refuses.

use std::time::Duration;

use keystone_mesh::quic::relay_session::{RelayError, RelaySession};
use keystone_mesh::quic::{Protocol, RelayServerConfig, frames};
use keystone_mesh_core::relay::message::{ClientMessage, MAX_MESSAGE, RelayMessage, VERSION};
use keystone_mesh_core::relay::{AdmissionLimits, Code, Frame, RelayDrop};
use tokio::sync::mpsc;

use crate::world::{Client, NETWORK, RELAY, Relay, approval, endpoint, eventually, id, loopback, verify, within};

async fn joiner(relay: &Relay, byte: u8) -> RelaySession {
    RelaySession::open(&endpoint(byte), &relay.addr(), None, true).await.unwrap()
}

fn refused(error: &RelayError) -> Code {
    match error {
        RelayError::Refused(refusal) => refusal.code,
        RelayError::Unreachable(_) | RelayError::Closed(_) | RelayError::Stream(_) | RelayError::Unexpected(_) => {
            panic!("not refused: {error}")
        }
    }
}

#[tokio::test]
async fn a_joiner_sends_no_datagrams() {
    let relay = Relay::start();
    let node = Client::node(&relay, 2);
    node.up().await;
    let session = joiner(&relay, 1).await;
    let frame = Frame::Data { peer: id(2), packet: b"let me in" }.encode();
    session.connection.send_datagram(frame.into()).unwrap();
    eventually("the drop is counted", || relay.server.snapshot().dropped(RelayDrop::NotAllowed) == 1).await;
    assert_eq!(relay.server.snapshot().clients, 1, "nor does it get any");
}

#[tokio::test]
async fn a_joiner_reaches_the_network_key_only_and_once_at_a_time() {
    let relay = Relay::start();
    let (node, session) = (Client::node(&relay, 2), joiner(&relay, 1).await);
    node.up().await;
    assert_eq!(refused(&session.splice(id(2)).await.err().unwrap()), Code::NotAllowed);
    let absent = session.splice(id(NETWORK)).await.err().unwrap();
    assert_eq!(refused(&absent), Code::NotConnected);
    assert!(absent.to_string().contains("control plane is not connected"), "{absent}");

    let (spliced, mut streams) = mpsc::channel(4);
    let network = Client::with(endpoint(NETWORK), relay.addr(), None, Some(std::sync::Arc::new(spliced)));
    network.up().await;
    let first = session.splice(id(NETWORK)).await.unwrap();
    let stream = within("the stream", streams.recv()).await.unwrap();
    assert_eq!((stream.from, stream.addr, stream.relay), (id(1), session.observed, id(RELAY)));
    assert_eq!(refused(&session.splice(id(NETWORK)).await.err().unwrap()), Code::Busy);
    drop((first, stream));
    within("a free place", async {
        while session.splice(id(NETWORK)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_joiner_is_cut_when_its_time_is_over() {
    let limits = AdmissionLimits { joiner_lifetime: Duration::from_millis(100), ..AdmissionLimits::default() };
    let config = RelayServerConfig { limits, ..RelayServerConfig::standalone(id(NETWORK), verify()) };
    let relay = Relay::with(loopback(), RELAY, config);
    let session = joiner(&relay, 1).await;
    let reason = within("the cut", session.connection.closed()).await;
    assert!(reason.to_string().contains("the time for joining is over"), "{reason}");
    assert_eq!(relay.server.snapshot().cut, 1);
    eventually("its place is free", || relay.server.snapshot().joiners == 0).await;
}

#[tokio::test]
async fn joiners_are_bounded() {
    let limits = AdmissionLimits { joiners_per_address: 1, ..AdmissionLimits::default() };
    let config = RelayServerConfig { limits, ..RelayServerConfig::standalone(id(NETWORK), verify()) };
    let relay = Relay::with(loopback(), RELAY, config);
    let first = joiner(&relay, 1).await;
    let error = RelaySession::open(&endpoint(2), &relay.addr(), None, true).await.unwrap_err();
    assert_eq!(refused(&error), Code::Busy);
    assert!(error.to_string().contains("from 127.0.0.1"), "{error}");
    first.close();
    eventually("its place is free", || relay.server.snapshot().joiners == 0).await;
    joiner(&relay, 2).await;
}

#[tokio::test]
async fn rubbish_instead_of_a_greeting_is_answered_with_the_reason() {
    let relay = Relay::start();
    let rubbish: [(&[u8], &str); 4] = [
        (b"\0\0\0\x05hello", "not a valid message"),
        (b"\xff\xff\xff\xff", "4294967295 bytes where at most 16384"),
        (b"\0\0\0\x15{\"type\":\"check_address\"", "not a valid message"),
        (b"\0\0\0\x1e{\"type\":\"hello\",\"version\":\"x\"}", "not a valid message"),
    ];
    for (bytes, reason) in rubbish {
        let node = endpoint(1);
        let connection = node.connect(relay.at, id(RELAY), Protocol::Relay).await.unwrap().connection;
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        let answer = within("an answer", frames::read(&mut receive, MAX_MESSAGE)).await.unwrap();
        let RelayMessage::Refused(refusal) = answer else { panic!("{answer:?}") };
        assert_eq!(refusal.code, Code::Malformed);
        assert!(refusal.message.contains(reason), "{refusal}");
    }
    eventually("they are counted", || relay.server.snapshot().refused["malformed"] == 4).await;
    Client::node(&relay, 1).up().await;
}

#[tokio::test]
async fn another_version_is_refused_by_number() {
    let relay = Relay::start();
    let connection = endpoint(1).connect(relay.at, id(RELAY), Protocol::Relay).await.unwrap().connection;
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    let hello = ClientMessage::Hello { version: VERSION + 1, credential: None, datagrams: true };
    frames::write(&mut send, &hello, MAX_MESSAGE).await.unwrap();
    let answer = within("an answer", frames::read(&mut receive, MAX_MESSAGE)).await.unwrap();
    let RelayMessage::Refused(refusal) = answer else { panic!("{answer:?}") };
    assert_eq!((refusal.code, refusal.message.contains("version 1, not 2")), (Code::UnsupportedVersion, true));
}

#[tokio::test]
async fn rubbish_after_the_greeting_harms_only_its_sender() {
    let relay = Relay::start();
    let (mut a, b) = (Client::node(&relay, 1), Client::node(&relay, 2));
    tokio::join!(a.up(), b.up());
    let mut session = RelaySession::open(&endpoint(3), &relay.addr(), Some(approval(3)), true).await.unwrap();
    session.connection.send_datagram(b"\x07rubbish".as_slice().into()).unwrap();
    session.connection.send_datagram(vec![2; 40].into()).unwrap();
    eventually("malformed datagrams", || relay.server.snapshot().dropped(RelayDrop::Malformed) == 2).await;

    let (mut send, mut receive) = session.connection.open_bi().await.unwrap();
    send.write_all(b"\0\0\0\x02{]").await.unwrap();
    let answer = within("an answer", frames::read(&mut receive, MAX_MESSAGE)).await.unwrap();
    assert!(matches!(answer, RelayMessage::Refused(refusal) if refusal.code == Code::Malformed));

    session.control.write_all(b"\xff\xff\xff\xff").await.unwrap();
    let reason = within("the close", session.connection.closed()).await;
    assert!(reason.to_string().contains("on the control stream"), "{reason}");
    b.send(1, &[b"unharmed"]);
    assert_eq!(a.receive().await.1, b"unharmed".as_slice());
}

#[tokio::test]
async fn streams_beyond_the_bound_are_refused() {
    let relay = Relay::start();
    let session = joiner(&relay, 1).await;
    // Seven besides the control stream is what the relay gives credit for; none of them says a word.
    let mut held = Vec::new();
    for _ in 0..7 {
        let (mut send, receive) = session.connection.open_bi().await.unwrap();
        send.write_all(b"\0").await.unwrap();
        held.push((send, receive));
    }
    let eighth = tokio::time::timeout(Duration::from_millis(200), session.connection.open_bi()).await;
    assert!(eighth.is_err(), "no credit for an eighth");
}
