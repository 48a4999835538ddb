//! What the fuzz targets share: reading numbers out of the fuzzer's bytes, sample statements, and packets with a
//! second implementation of the Internet checksum to hold the first one against.

pub mod packet;
pub mod sample;

/// The fuzzer's bytes, read front to back; zeros come after their end, so that every input means something.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Starts to read.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `N` bytes.
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next two bytes, big-endian.
    pub fn number(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }

    /// The next `len` bytes, or as many as there are.
    pub fn slice(&mut self, len: usize) -> &'a [u8] {
        let (slice, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        slice
    }

    /// Everything that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}
