//! Messages on asynchronous byte streams, framed as [`keystone_mesh_core::wire`] says.

use std::io;
use std::time::Duration;

use keystone_mesh_core::wire::{self, LENGTH_BYTES, WireError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why no message came or went.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The stream ended where a message was expected.
    #[error("the other end closed the stream")]
    Closed,
    /// The stream ended within a message.
    #[error("the stream ended within a message")]
    Truncated,
    /// Not a message that is expected here.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(#[source] io::Error),
    /// Nothing came in time.
    #[error("no message within {0:?}")]
    TimedOut(Duration),
}

/// Writes one message of at most `limit` bytes and flushes it.
pub async fn write<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &T,
    limit: usize,
) -> Result<(), StreamError> {
    let frame = wire::encode(message, limit)?;
    stream.write_all(&frame).await.map_err(StreamError::Io)?;
    stream.flush().await.map_err(StreamError::Io)
}

/// Reads one message of at most `limit` bytes. Not to be cancelled half-way: what was read would be lost.
pub async fn read<T: DeserializeOwned>(stream: &mut (impl AsyncRead + Unpin), limit: usize) -> Result<T, StreamError> {
    let mut length = [0; LENGTH_BYTES];
    let first = match stream.read(&mut length).await {
        Ok(0) => return Err(StreamError::Closed),
        Ok(first) => first,
        // TLS calls an end without its own farewell so; between messages nothing is missing.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(StreamError::Closed),
        Err(error) => return Err(StreamError::Io(error)),
    };
    stream.read_exact(&mut length[first..]).await.map_err(within_message)?;
    let mut body = vec![0; wire::decode_length(length, limit)?];
    stream.read_exact(&mut body).await.map_err(within_message)?;
    Ok(wire::decode_message(&body)?)
}

/// [`read`], but the message must come within `patience`.
pub async fn read_within<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
    limit: usize,
    patience: Duration,
) -> Result<T, StreamError> {
    tokio::time::timeout(patience, read(stream, limit)).await.map_err(|_| StreamError::TimedOut(patience))?
}

fn within_message(error: io::Error) -> StreamError {
    if error.kind() == io::ErrorKind::UnexpectedEof { StreamError::Truncated } else { StreamError::Io(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_cross_a_stream_and_its_end_is_told_apart() {
        let (mut here, mut there) = tokio::io::duplex(16);
        let writing = tokio::spawn(async move {
            write(&mut here, &"hello".to_owned(), 100).await.unwrap();
            here.write_all(&[0, 0, 0, 9, b'"']).await.unwrap();
        });
        assert_eq!(read::<String>(&mut there, 100).await.unwrap(), "hello");
        assert!(matches!(read::<String>(&mut there, 100).await, Err(StreamError::Truncated)));
        writing.await.unwrap();
        assert!(matches!(read::<String>(&mut there, 100).await, Err(StreamError::Closed)));
    }

    #[tokio::test]
    async fn an_announced_length_beyond_the_limit_allocates_nothing() {
        let mut stream = &[0xff, 0xff, 0xff, 0xff, 0][..];
        let error = read::<String>(&mut stream, 100).await.unwrap_err();
        assert!(matches!(error, StreamError::Wire(WireError::TooLarge { limit: 100, .. })), "{error}");
    }
}
