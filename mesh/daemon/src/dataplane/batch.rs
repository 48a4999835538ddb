//! Runs of sealed datagrams: the seam between the engine and the socket.
//!
//! The engine seals straight into the buffer that is sent: [`Runs::reserve`] gives the room, [`Runs::commit`] says how
//! much of it was used. Datagrams that one UDP GSO send can carry (one destination, one size, the last possibly
//! shorter) lie side by side in one run; whatever else comes opens the next run. When all runs are in use there is no
//! room until they are sent. Batching comes from load alone: nothing waits for a run to fill.
//!
//! ```text
//!   run 0 -> A   [1452][1452][1452][ 300]    closed by its short last datagram
//!   run 1 -> B   [ 112][ 112]                open
//!   run 2        free
//! ```

use super::remote::Remote;
use super::wg;

/// Bytes of one GSO send: the largest UDP payload over IPv4.
const MAX_BYTES: usize = 65507;
/// Runs in flight. One super packet of equal segments fills less than two.
const RUNS: usize = 4;

/// A fixed set of runs.
pub(crate) struct Runs {
    runs: Vec<Run>,
    used: usize,
    reserved: Option<Remote>,
}

struct Run {
    to: Option<Remote>,
    /// [`MAX_BYTES`] and room for the engine to write an initiation where only a few bytes are left.
    buffer: Box<[u8]>,
    len: usize,
    stride: usize,
    datagrams: usize,
    closed: bool,
}

impl Runs {
    pub(crate) fn new() -> Self {
        let run = || Run {
            to: None,
            buffer: vec![0; MAX_BYTES + wg::INITIATION_LEN].into_boxed_slice(),
            len: 0,
            stride: 0,
            datagrams: 0,
            closed: false,
        };
        Self { runs: std::iter::repeat_with(run).take(RUNS).collect(), used: 0, reserved: None }
    }

    /// Room for a datagram of up to `len` bytes to `to`, and never less than the engine needs for an initiation. None
    /// if everything is in use; then send and ask again. `max_datagrams` is what one send takes.
    pub(crate) fn reserve(&mut self, to: Remote, len: usize, max_datagrams: usize) -> Option<&mut [u8]> {
        if len > MAX_BYTES {
            return None;
        }
        let fits = self.used > 0 && self.runs[self.used - 1].admits(&to, len, max_datagrams);
        if !fits {
            if self.used == RUNS {
                return None;
            }
            self.used += 1;
            self.runs[self.used - 1].reset();
        }
        self.reserved = Some(to);
        let run = &mut self.runs[self.used - 1];
        let room = len.max(wg::INITIATION_LEN);
        Some(&mut run.buffer[run.len..run.len + room])
    }

    /// Adds the datagram of `len` bytes that was written to the room reserved last. Zero takes the reservation back.
    pub(crate) fn commit(&mut self, len: usize) {
        let Some(to) = self.reserved.take() else { return };
        let run = &mut self.runs[self.used - 1];
        if len > 0 {
            run.commit(to, len);
        } else if run.datagrams == 0 {
            self.used -= 1;
        }
    }

    /// Gives every run as destination, bytes and datagram size, in order, and frees them.
    pub(crate) fn drain(&mut self, mut send: impl FnMut(&Remote, &[u8], usize)) {
        for run in &self.runs[..self.used] {
            if let Some(to) = &run.to {
                send(to, &run.buffer[..run.len], run.stride);
            }
        }
        self.used = 0;
    }
}

impl Run {
    fn reset(&mut self) {
        self.to = None;
        self.len = 0;
        self.stride = 0;
        self.datagrams = 0;
        self.closed = false;
    }

    fn admits(&self, to: &Remote, len: usize, max_datagrams: usize) -> bool {
        !self.closed
            && self.to.as_ref() == Some(to)
            && len <= self.stride
            && self.datagrams < max_datagrams
            && self.len + len <= MAX_BYTES
    }

    fn commit(&mut self, to: Remote, len: usize) {
        if self.datagrams == 0 {
            self.to = Some(to);
            self.stride = len;
        }
        self.closed = len < self.stride;
        self.len += len;
        self.datagrams += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn to(port: u16) -> Remote {
        Remote::Direct(SocketAddr::from(([192, 0, 2, 1], port)))
    }

    fn put(runs: &mut Runs, port: u16, len: usize) -> bool {
        let Some(room) = runs.reserve(to(port), len, 64) else { return false };
        assert!(room.len() >= len.max(wg::INITIATION_LEN));
        room[..len].fill(port as u8);
        runs.commit(len);
        true
    }

    fn drain(runs: &mut Runs) -> Vec<(u16, usize, usize)> {
        let mut sent = Vec::new();
        runs.drain(|to, bytes, stride| {
            let Remote::Direct(addr) = to else { panic!("{to:?}") };
            assert!(bytes.iter().all(|byte| *byte == addr.port() as u8));
            sent.push((addr.port(), bytes.len(), stride));
        });
        sent
    }

    #[test]
    fn equal_datagrams_share_a_run_that_a_short_one_closes() {
        let mut runs = Runs::new();
        for len in [1452, 1452, 300, 300, 1452] {
            assert!(put(&mut runs, 7, len));
        }
        assert_eq!(drain(&mut runs), [(7, 3204, 1452), (7, 300, 300), (7, 1452, 1452)]);
        assert_eq!(drain(&mut runs), []);
    }

    #[test]
    fn another_destination_opens_a_run_and_four_are_all_there_are() {
        let mut runs = Runs::new();
        for port in 1..=4 {
            assert!(put(&mut runs, port, 100));
        }
        assert!(!put(&mut runs, 5, 100));
        assert!(put(&mut runs, 4, 100));
        assert_eq!(drain(&mut runs).len(), 4);
        assert!(put(&mut runs, 5, 100));
    }

    #[test]
    fn a_run_keeps_within_64_datagrams_and_one_udp_payload() {
        let mut runs = Runs::new();
        for _ in 0..100 {
            assert!(put(&mut runs, 1, 80));
        }
        assert_eq!(drain(&mut runs), [(1, 64 * 80, 80), (1, 36 * 80, 80)]);
        for _ in 0..50 {
            assert!(put(&mut runs, 1, 1452));
        }
        assert_eq!(drain(&mut runs), [(1, 45 * 1452, 1452), (1, 5 * 1452, 1452)]);
        assert!(!put(&mut runs, 1, 65508));
    }

    #[test]
    fn a_reservation_taken_back_leaves_nothing() {
        let mut runs = Runs::new();
        assert!(runs.reserve(to(1), 100, 64).is_some());
        runs.commit(0);
        assert_eq!(drain(&mut runs), []);
        assert!(put(&mut runs, 1, 100));
        assert!(runs.reserve(to(1), 100, 64).is_some());
        runs.commit(0);
        assert_eq!(drain(&mut runs), [(1, 100, 100)]);
    }
}
