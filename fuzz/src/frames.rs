//! The frame decoder, which both sides have: its bound, how the stream is cut, and what it is to say of the stream.

use bailey_types::guest::frame::{Decoder, FrameError, HEADER, encode};
use bailey_types::guest::{GUEST_FRAME_MAX, HOST_FRAME_MAX, StreamId};

/// Bounds to choose from: the host's, the guest's, and some that a short input reaches.
pub(crate) const BOUNDS: [usize; 6] = [GUEST_FRAME_MAX, HOST_FRAME_MAX, 0, 1, 16, 256];

/// Cuts are as many as half a byte counts.
const CUTS: u8 = 0x0f;

/// An input: a bound, the lengths of the pieces (over and over; none: all at once), and the stream.
struct Input<'a> {
    max: usize,
    pieces: Vec<usize>,
    wire: &'a [u8],
}

fn read(input: &[u8]) -> Option<Input<'_>> {
    let (&[bound, count], rest) = input.split_first_chunk()?;
    let (cuts, wire) = rest.split_at_checked(usize::from(count & CUTS))?;
    let max = BOUNDS[usize::from(bound) % BOUNDS.len()];
    Some(Input { max, pieces: cuts.iter().map(|cut| usize::from(*cut) + 1).collect(), wire })
}

/// Feeds a stream piece by piece. Whatever the cuts: the frames are the stream, byte for byte; one that is too long is
/// refused as soon as its header is there; no more is held than the largest frame and one piece.
pub fn check(input: &[u8]) -> bool {
    let Some(Input { max, pieces, wire }) = read(input) else { return false };
    let mut decoder = Decoder::new(max);
    let mut pieces = pieces.iter().cycle();
    let mut again = Vec::new();
    let (mut fed, mut longest) = (0, 0);
    while fed < wire.len() {
        let piece = pieces.next().map_or(wire.len(), |length| *length).min(wire.len() - fed);
        decoder.feed(&wire[fed..fed + piece]);
        fed += piece;
        longest = longest.max(piece);
        let held = decoder.allocated();
        assert!(held <= HEADER + max + longest, "{held} bytes for frames of {max} in pieces of {longest}");
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    assert!(frame.payload.len() <= max, "a frame of {} bytes", frame.payload.len());
                    stream(frame.channel);
                    encode(frame.channel, &frame.payload, &mut again);
                    assert_eq!(again, wire[..again.len()], "the frames are not the stream");
                }
                Ok(None) => {
                    let rest = &wire[again.len()..fed];
                    let whole = announced(rest).is_some_and(|(length, _)| rest.len() >= HEADER + length);
                    assert!(!whole, "a frame that has arrived is held back");
                    break;
                }
                Err(error) => {
                    refused(&error, &wire[again.len()..fed], max);
                    assert_eq!(decoder.next_frame(), Err(error), "it goes on after what it refused");
                    return false;
                }
            }
        }
        let waiting = announced(&wire[again.len()..fed]);
        assert!(waiting.is_none_or(|(length, _)| length <= max), "a frame that is too long is waited for");
    }
    again.len() == wire.len()
}

/// Length and channel of the next frame, when its header is there.
fn announced(rest: &[u8]) -> Option<(usize, u32)> {
    let (length, rest) = rest.split_first_chunk()?;
    let (channel, _) = rest.split_first_chunk()?;
    Some((u32::from_le_bytes(*length) as usize, u32::from_le_bytes(*channel)))
}

fn refused(error: &FrameError, rest: &[u8], max: usize) {
    let FrameError::TooLong { channel, length, max: told } = error;
    assert_eq!(announced(rest), Some((*length as usize, *channel)), "it refuses what is not there");
    assert!(*length as usize > max && *told == max, "it refuses a frame that is allowed");
}

/// A channel's number is one stream's, or none's.
fn stream(channel: u32) {
    match StreamId::from_channel(channel) {
        Some(stream) => assert_eq!(stream.channel(), channel),
        None => assert!(channel < 4 || channel % 4 == 3, "channel {channel} has no stream"),
    }
}
