//! Lines of a block of bytes.

use std::sync::Arc;

use super::{Chunk, ChunkLimits, InputLine, Origin};

/// Adds the lines of a block behind `before` to a chunk, within its room. The last one must have its terminator,
/// unless nothing will follow (`is_over`) or it is too long; `is_skipping` says, before and after,
/// that the block is within a line that was too long. Returns the numbers of bytes and of lines that
/// were used.
pub(super) fn split(
    block: &[u8],
    is_over: bool,
    before: &Origin,
    is_skipping: &mut bool,
    chunk: &mut Chunk,
    room: &mut ChunkLimits,
    longest: usize,
) -> (usize, u64) {
    let (mut used, mut lines) = (0, 0);
    while used < block.len() && room.lines > 0 && room.bytes > 0 {
        let rest = &block[used..];
        let end = memchr::memchr(b'\n', rest);
        let is_too_long = rest.len() > longest + 1;
        let (line, behind) = match end {
            Some(at) => (&rest[..at], at + 1),
            None if is_over || is_too_long || *is_skipping => (rest, rest.len()),
            None => break,
        };
        let was_skipping = std::mem::replace(is_skipping, end.is_none() && !is_over);
        used += behind;
        lines += u64::from(!*is_skipping);
        if was_skipping {
            continue;
        }
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let bytes = line[..line.len().min(longest)].to_vec();
        room.lines -= 1;
        room.bytes = room.bytes.saturating_sub(bytes.len() + 1);
        let number = before.line + lines + u64::from(*is_skipping);
        chunk.lines.push(InputLine {
            origin: Origin { file: Arc::clone(&before.file), line: number },
            bytes,
            is_truncated: line.len() > longest,
        });
    }
    (used, lines)
}
