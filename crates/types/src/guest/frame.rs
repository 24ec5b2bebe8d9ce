//! Frames: `length: u32 LE`, `channel: u32 LE`, then `length` bytes.
//!
//! An empty frame on a stream's channel is its end of file. Decoding is incremental and holds no more than one largest
//! frame plus what one feed brings, whatever the peer claims, if all whole frames are taken before the next feed.

use thiserror::Error;

/// The control channel.
pub const CONTROL: u32 = 0;

/// Bytes before each payload.
pub const HEADER: usize = 8;

/// One frame, as it left the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub channel: u32,
    pub payload: Vec<u8>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("a frame of {length} bytes on channel {channel}, where {max} are allowed")]
    TooLong { channel: u32, length: u32, max: usize },
}

/// Appends one frame to `out`.
///
/// # Panics
/// When the payload is longer than `u32::MAX`; callers bound payloads far below.
pub fn encode(channel: u32, payload: &[u8], out: &mut Vec<u8>) {
    let length = u32::try_from(payload.len()).expect("payloads are bounded by their callers");
    out.reserve(HEADER + payload.len());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&channel.to_le_bytes());
    out.extend_from_slice(payload);
}

/// Takes bytes as they come and gives whole frames.
#[derive(Debug)]
pub struct Decoder {
    max: usize,
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder that refuses payloads longer than `max` bytes.
    pub fn new(max: usize) -> Decoder {
        Decoder { max, buffer: Vec::new(), start: 0 }
    }

    /// Takes the bytes of one read.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        let wanted = self.buffer.len() + bytes.len();
        if wanted > self.buffer.capacity() {
            // By doubling, as it would grow by itself, but not beyond what can come.
            let most = HEADER.saturating_add(self.max).saturating_add(bytes.len());
            let capacity = (self.buffer.capacity() * 2).min(most).max(wanted);
            self.buffer.reserve_exact(capacity - self.buffer.len());
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that it has allocated.
    pub fn allocated(&self) -> usize {
        self.buffer.capacity()
    }

    /// The next whole frame, if it has arrived.
    ///
    /// # Errors
    /// When the peer announces a frame longer than allowed. The stream cannot be used after that.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some((header, body)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let channel = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let wanted = length as usize;
        if wanted > self.max {
            return Err(FrameError::TooLong { channel, length, max: self.max });
        }
        let Some(payload) = body.get(..wanted) else { return Ok(None) };
        let frame = Frame { channel, payload: payload.to_vec() };
        self.start += HEADER + wanted;
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cut_of_the_stream(
            frames in prop::collection::vec((any::<u32>(), prop::collection::vec(any::<u8>(), 0..300)), 0..20),
            cuts in prop::collection::vec(1usize..64, 1..50),
        ) {
            let mut wire = Vec::new();
            for (channel, payload) in &frames {
                encode(*channel, payload, &mut wire);
            }
            let mut decoder = Decoder::new(1024);
            let mut seen = Vec::new();
            let mut cuts = cuts.iter().cycle();
            let mut rest = wire.as_slice();
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                decoder.feed(now);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push((frame.channel, frame.payload));
                }
                rest = later;
            }
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn hostile_bytes_never_grow_the_buffer_beyond_a_frame(
            bytes in prop::collection::vec(any::<u8>(), 0..4096),
        ) {
            let mut decoder = Decoder::new(256);
            for chunk in bytes.chunks(100) {
                decoder.feed(chunk);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(frame)) => prop_assert!(frame.payload.len() <= 256),
                        Ok(None) => break,
                        Err(FrameError::TooLong { .. }) => return Ok(()),
                    }
                }
                prop_assert!(decoder.allocated() <= HEADER + 256 + 100);
            }
        }
    }

    #[test]
    fn the_buffer_does_not_double_beyond_a_frame_and_a_feed() {
        let mut wire = Vec::new();
        encode(4, &[0; 100], &mut wire);
        let mut decoder = Decoder::new(100);
        // The third piece would double what is held to 200 bytes.
        for piece in wire[..107].chunks(50) {
            decoder.feed(piece);
            assert_eq!(decoder.next_frame(), Ok(None));
            assert!(decoder.allocated() <= HEADER + 100 + 50, "{} bytes", decoder.allocated());
        }
    }
}
