//! Packets over QUIC datagrams: queueing without waiting and without growing.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use keystone_mesh_core::relay::frame::{Frame, MIN_DATAGRAM};
use quinn::{Connection, ConnectionError, SendDatagramError};

/// Datagrams that a reader takes before it looks at anything else.
pub(crate) const BATCH: usize = 64;

/// Why a frame was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotSent {
    /// The connection's queue is full, or has no room for all parts.
    QueueFull,
    /// The connection is over, or takes no datagrams of a useful size, or the packet is not sendable at all.
    Unsendable,
}

/// Queues a frame on a connection, split into what the connection takes. `max_datagram` is the connection's largest
/// datagram as last seen; it is looked up again where that was too much. Callable from any thread.
///
/// quinn would make room by dropping what waits longest, uncounted; what comes last is refused instead, and counted.
pub(crate) fn send(
    connection: &Connection,
    frame: Frame<'_>,
    id: u16,
    max_datagram: &mut usize,
) -> Result<(), NotSent> {
    for _ in 0..2 {
        match send_split(connection, frame, id, *max_datagram) {
            Err(SendDatagramError::TooLarge) => *max_datagram = max_datagram_size(connection),
            Ok(sent) => return sent,
            Err(
                SendDatagramError::UnsupportedByPeer
                | SendDatagramError::Disabled
                | SendDatagramError::ConnectionLost(_),
            ) => return Err(NotSent::Unsendable),
        }
    }
    Err(NotSent::Unsendable)
}

/// The connection's largest datagram, zero where it takes none.
pub(crate) fn max_datagram_size(connection: &Connection) -> usize {
    connection.max_datagram_size().unwrap_or(0)
}

fn send_split(
    connection: &Connection,
    frame: Frame<'_>,
    id: u16,
    max_datagram: usize,
) -> Result<Result<(), NotSent>, SendDatagramError> {
    if max_datagram < MIN_DATAGRAM {
        return Err(SendDatagramError::TooLarge);
    }
    let Ok(frames) = frame.split(id, max_datagram) else { return Ok(Err(NotSent::Unsendable)) };
    for frame in frames {
        let mut sending = pin!(connection.send_datagram_wait(frame.encode().into()));
        match sending.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => return Ok(Err(NotSent::QueueFull)),
        }
    }
    Ok(Ok(()))
}

/// Waits for a datagram, then takes what else is there, [`BATCH`] at most.
pub(crate) async fn receive_batch(connection: &Connection, batch: &mut Vec<Bytes>) -> Result<(), ConnectionError> {
    batch.clear();
    batch.push(connection.read_datagram().await?);
    while batch.len() < BATCH {
        let mut reading = pin!(connection.read_datagram());
        match reading.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(datagram)) => batch.push(datagram),
            // An error comes again with the next wait.
            Poll::Ready(Err(_)) | Poll::Pending => break,
        }
    }
    Ok(())
}
