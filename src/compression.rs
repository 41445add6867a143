//! Compressed files, known by their first bytes.

use std::io::{self, BufRead, Read};

use crate::wire::batch;

/// The first bytes of a gzip member (RFC 1952, section 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The first bytes of a zstd frame (RFC 8878, section 3.1.1).
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Compression of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// None.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// zstd (RFC 8878).
    Zstd,
}

impl Compression {
    /// Returns the compression of a file that begins like this.
    pub fn of(start: &[u8]) -> Self {
        // Some programs write this before or between frames (RFC 8878, section 3.1.2).
        let is_skippable = start.len() >= 4 && start[0] & 0xf0 == 0x50 && start[1..4] == [0x2a, 0x4d, 0x18];
        if start.starts_with(&GZIP_MAGIC) {
            Self::Gzip
        } else if start.starts_with(&ZSTD_MAGIC) || is_skippable {
            Self::Zstd
        } else {
            Self::None
        }
    }
}

/// Inflates the operator's own file as a stream where its first bytes say that it is compressed. A
/// window of up to 128 MiB is kept, which is the default of `zstd -d`.
///
/// # Errors
/// When the first bytes cannot be read.
pub fn unpacked(
    mut packed: impl BufRead + Send + 'static,
) -> io::Result<(Compression, Box<dyn Read + Send>)> {
    let compression = Compression::of(packed.fill_buf()?);
    Ok(match compression {
        Compression::Gzip => (compression, Box::new(batch::inflate(packed))),
        Compression::Zstd => (compression, Box::new(zstd::Decoder::with_buffer(packed)?)),
        Compression::None => (compression, Box::new(packed)),
    })
}
