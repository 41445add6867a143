//! Splits a body into lines: the coding is recognised, the inflated size and the number of lines
//! are bounded while inflating, and the bytes of each line are kept exactly.

use std::io::{BufRead, BufReader, Read, Take, Write};

/// Coding of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// Uncoded.
    Identity,
    /// gzip (RFC 1952), one member or many.
    Gzip,
}

/// The coding's name is unknown and the body does not begin like gzip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown content coding")]
pub struct UnknownCoding;

/// The first two bytes of a gzip member (RFC 1952, section 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

impl Coding {
    /// Returns the coding of a body, from its declared name and its first bytes. Konnect documents
    /// the name `application/gzip`, which is not registered; a body that begins like gzip is gzip
    /// whatever is declared, since no event begins like that.
    ///
    /// # Errors
    /// An unknown name, and the body does not begin like gzip.
    pub fn of(declared: Option<&str>, body: &[u8]) -> Result<Self, UnknownCoding> {
        if body.starts_with(&GZIP_MAGIC) {
            return Ok(Self::Gzip);
        }
        let name = declared.unwrap_or("").trim().to_ascii_lowercase();
        match name.as_str() {
            "" | "identity" => Ok(Self::Identity),
            "application/gzip" | "application/x-gzip" | "gzip" | "x-gzip" => Ok(Self::Gzip),
            _ => Err(UnknownCoding),
        }
    }
}

/// Rule by which a stored body is taken apart again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Inflated, into its lines.
    Lines(Coding),
    /// Inflated, and kept in one piece: no line of it is an event, or it could not be inflated and
    /// counts as uncoded.
    Whole(Coding),
}

impl Packing {
    const ALL: [Self; 4] = [
        Self::Lines(Coding::Identity),
        Self::Lines(Coding::Gzip),
        Self::Whole(Coding::Identity),
        Self::Whole(Coding::Gzip),
    ];

    /// Returns the code under which it is stored.
    pub fn code(self) -> u8 {
        match self {
            Self::Lines(Coding::Identity) => 0,
            Self::Lines(Coding::Gzip) => 1,
            Self::Whole(Coding::Identity) => 2,
            Self::Whole(Coding::Gzip) => 3,
        }
    }

    /// Returns the packing with that stored code.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|packing| packing.code() == code)
    }

    /// Returns the packing of the same body when it is kept in one piece.
    pub fn whole(self) -> Self {
        let (Self::Lines(coding) | Self::Whole(coding)) = self;
        Self::Whole(coding)
    }

    /// Inflates a stored body, which passed the caps when it was received.
    ///
    /// # Errors
    /// When the bytes have changed.
    pub fn unpack(self, body: &[u8]) -> Result<Vec<u8>, DecodeError> {
        let (Self::Lines(coding) | Self::Whole(coding)) = self;
        Ok(decode(body, coding, Caps::NONE, &mut |_| true)?.into_bytes())
    }

    /// Returns the lines of an inflated body, in the order of their verdicts.
    pub fn lines(self, inflated: &[u8]) -> impl Iterator<Item = &[u8]> {
        let (whole, split) = match self {
            Self::Lines(_) => (None, Some(lines(without_byte_order_mark(inflated)))),
            Self::Whole(_) => (Some(inflated), None),
        };
        whole.into_iter().chain(split.into_iter().flatten())
    }
}

/// Limits of one body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Bytes after inflation.
    pub decoded: usize,
    /// Lines that are not blank.
    pub lines: usize,
}

impl Caps {
    /// No limits: for bodies that passed the limits once and were stored by us.
    pub const NONE: Self = Self { decoded: usize::MAX, lines: usize::MAX };
}

/// Reason why a whole body is not a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// More bytes than [`Caps::decoded`].
    #[error("the body inflates to more than {0} bytes")]
    TooLarge(usize),
    /// More lines than [`Caps::lines`].
    #[error("the body has more than {0} lines")]
    TooManyLines(usize),
    /// The bytes are not what their coding says.
    #[error("the body is not valid gzip: {0}")]
    Undecodable(String),
    /// The memory for it could not be acquired.
    #[error("no memory for the inflated body")]
    NoMemory,
}

/// A body's bytes after inflation, known to be within the caps.
#[derive(Debug)]
pub struct Decoded {
    bytes: Vec<u8>,
    lines: usize,
}

/// Number of bytes that are inflated between two checks of the caps.
const STEP: usize = 64 * 1024;

/// Inflates a body; twice, under the same caps, when its content begins like gzip again. `reserve`
/// is called before each growth of the memory in use, in bytes, and may refuse.
///
/// # Errors
/// See [`DecodeError`]. A body that exceeds a cap is refused as a whole.
pub fn decode(
    body: &[u8],
    coding: Coding,
    caps: Caps,
    reserve: &mut dyn FnMut(usize) -> bool,
) -> Result<Decoded, DecodeError> {
    let mut bytes = Vec::new();
    let mut lines = LineCount::default();
    match coding {
        Coding::Identity => {
            if body.len() > caps.decoded {
                return Err(DecodeError::TooLarge(caps.decoded));
            }
            lines.add(body);
            if !reserve(body.len()) {
                return Err(DecodeError::NoMemory);
            }
            bytes.extend_from_slice(body);
        }
        // An empty body has no member, and no line either.
        Coding::Gzip if body.is_empty() => {}
        Coding::Gzip => {
            let mut reader = Inflater::new(body, caps.decoded)?;
            loop {
                let start = bytes.len();
                if bytes.capacity() < start + STEP {
                    // Grow by half, never past the cap: doubling would hold twice the cap for a
                    // moment.
                    let target = (start + start / 2 + STEP).min(caps.decoded.saturating_add(STEP));
                    let more = target.max(start + STEP) - bytes.capacity();
                    if !reserve(more) {
                        return Err(DecodeError::NoMemory);
                    }
                    bytes.reserve_exact(target.max(start + STEP) - start);
                }
                bytes.resize(start + STEP, 0);
                let read = reader.read(&mut bytes[start..], caps.decoded)?;
                bytes.truncate(start + read);
                if bytes.len() > caps.decoded {
                    return Err(DecodeError::TooLarge(caps.decoded));
                }
                lines.add(&bytes[start..]);
                // One of them may turn out to be blank.
                if read == 0 || lines.lines > caps.lines.saturating_add(1) {
                    break;
                }
            }
        }
    }
    let mut lines = lines.lines;
    // A line that has nothing but the mark is blank.
    if let Some(text) = bytes.strip_prefix(BYTE_ORDER_MARK)
        && text.split(|byte| *byte == b'\n').next().is_none_or(is_blank)
    {
        lines -= 1;
    }
    if lines > caps.lines { Err(DecodeError::TooManyLines(caps.lines)) } else { Ok(Decoded { bytes, lines }) }
}

#[expect(clippy::disallowed_types, reason = "this is the one place that caps what it inflates")]
type Gunzip<R> = flate2::bufread::MultiGzDecoder<R>;

/// The first inflation, with a bound on its output.
type Inflated<'a> = BufReader<Take<Gunzip<&'a [u8]>>>;

/// A body that is being inflated. The output of the first inflation is never more than a byte over
/// the cap, whatever the second does with it.
enum Inflater<'a> {
    Once(Box<Inflated<'a>>),
    Twice(Box<Gunzip<Inflated<'a>>>),
}

impl<'a> Inflater<'a> {
    fn new(body: &'a [u8], cap: usize) -> Result<Self, DecodeError> {
        let mut once = BufReader::with_capacity(STEP, Gunzip::new(body).take(cap.saturating_add(1) as u64));
        let start = once.fill_buf().map_err(|error| DecodeError::Undecodable(error.to_string()))?;
        Ok(match start.starts_with(&GZIP_MAGIC) {
            true => Self::Twice(Box::new(Gunzip::new(once))),
            false => Self::Once(Box::new(once)),
        })
    }

    fn read(&mut self, buffer: &mut [u8], cap: usize) -> Result<usize, DecodeError> {
        let (read, left) = match self {
            Self::Once(once) => (once.read(buffer), once.get_ref().limit()),
            Self::Twice(twice) => (twice.read(buffer), twice.get_ref().get_ref().limit()),
        };
        match read {
            Err(_) if left == 0 => Err(DecodeError::TooLarge(cap)),
            read => read.map_err(|error| DecodeError::Undecodable(error.to_string())),
        }
    }
}

/// Inflates the operator's own files as a stream, every member of them. Without caps: not for what
/// a peer sends.
pub fn inflate(file: impl BufRead) -> impl Read {
    #[expect(clippy::disallowed_types, reason = "nothing is kept: the caller reads it piece by piece")]
    flate2::bufread::MultiGzDecoder::new(file)
}

/// Compresses lines for a receiver: one gzip member.
pub fn encode(lines: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(lines)?;
    encoder.finish()
}

impl Decoded {
    /// Returns the lines in their order, without terminator (`\n` or `\r\n`) and without blank
    /// ones; a byte order mark before the first belongs to none.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        lines(without_byte_order_mark(&self.bytes))
    }

    /// Returns whether there is a byte order mark in front.
    pub fn has_byte_order_mark(&self) -> bool {
        self.bytes.starts_with(BYTE_ORDER_MARK)
    }

    /// Returns the number of lines.
    pub fn line_count(&self) -> usize {
        self.lines
    }

    /// Returns the bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

/// Returns the lines of inflated bytes: see [`Decoded::lines`].
pub fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(bytes);
    std::iter::from_fn(move || {
        let bytes = rest?;
        let (line, behind) = match memchr::memchr(b'\n', bytes) {
            Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
            None => (bytes, None),
        };
        rest = behind;
        Some(line.strip_suffix(b"\r").unwrap_or(line))
    })
    .filter(|line| !is_blank(line))
}

/// Byte order mark that some editors and languages write before UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

fn without_byte_order_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// Counts the lines of a stream of pieces that are not blank.
#[derive(Default)]
struct LineCount {
    lines: usize,
    /// The last line of the last piece is not finished and not blank.
    open: bool,
}

impl LineCount {
    fn add(&mut self, piece: &[u8]) {
        let mut start = 0;
        for end in memchr::memchr_iter(b'\n', piece) {
            self.line(&piece[start..end]);
            self.open = false;
            start = end + 1;
        }
        self.line(&piece[start..]);
    }

    fn line(&mut self, part: &[u8]) {
        if !self.open && !is_blank(part) {
            self.open = true;
            self.lines += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps { decoded: 1 << 20, lines: 1000 };

    fn inflate(body: &[u8], caps: Caps) -> Result<Vec<Vec<u8>>, DecodeError> {
        let coding = Coding::of(Some("application/gzip"), body).unwrap();
        let decoded = decode(body, coding, caps, &mut |_| true)?;
        assert_eq!(decoded.lines().count(), decoded.line_count());
        Ok(decoded.lines().map(<[u8]>::to_vec).collect())
    }

    #[test]
    fn every_documented_name_is_a_coding() {
        let gzip = encode(b"x").unwrap();
        for name in ["application/gzip", "application/x-gzip", "gzip", "x-gzip", "GZIP", " gzip "] {
            assert_eq!(Coding::of(Some(name), b""), Ok(Coding::Gzip), "{name}");
            assert_eq!(Coding::of(Some(name), &gzip), Ok(Coding::Gzip), "{name}");
        }
        assert_eq!(Coding::of(None, &gzip), Ok(Coding::Gzip));
        assert_eq!(Coding::of(None, b"CEF:0"), Ok(Coding::Identity));
        assert_eq!(Coding::of(Some("identity"), b"{"), Ok(Coding::Identity));
        assert_eq!(Coding::of(Some("br"), b"{"), Err(UnknownCoding));
        assert_eq!(Coding::of(Some("br"), &gzip), Ok(Coding::Gzip));
    }

    #[test]
    fn lines_keep_their_bytes() {
        let body = b"a \r\n\n\r\n  \n\xff\x00b\r\r\nlast";
        let found: Vec<_> = lines(body).collect();
        assert_eq!(found, [&b"a "[..], b"\xff\x00b\r", b"last"]);
        assert_eq!(lines(b"").count(), 0);
        assert_eq!(lines(b"a\n").count(), 1);
    }

    #[test]
    fn a_byte_order_mark_belongs_to_no_line() {
        let decoded = decode(b"\xef\xbb\xbf{}\n\xef\xbb\xbf", Coding::Identity, CAPS, &mut |_| true).unwrap();
        assert!(decoded.has_byte_order_mark());
        assert_eq!(decoded.lines().collect::<Vec<_>>(), [&b"{}"[..], b"\xef\xbb\xbf"]);
        for blank in [&b"\xef\xbb\xbf"[..], b"\xef\xbb\xbf \r\n\n", b"\xef\xbb\xbf\na\nb"] {
            let lines = inflate(&encode(blank).unwrap(), CAPS).unwrap();
            assert_eq!(
                lines,
                blank[3..].split(|byte| *byte == b'\n').filter(|line| !is_blank(line)).collect::<Vec<_>>()
            );
        }
        let bytes = decoded.into_bytes();
        assert_eq!(Packing::Lines(Coding::Identity).lines(&bytes).next(), Some(&b"{}"[..]));
        assert_eq!(Packing::Whole(Coding::Identity).lines(&bytes).next(), Some(&bytes[..]));
    }

    #[test]
    fn a_line_may_span_several_members() {
        let body = [encode(b"one\ntw").unwrap(), encode(b"o\nthree").unwrap(), encode(b"").unwrap()].concat();
        assert_eq!(inflate(&body, CAPS).unwrap(), [&b"one"[..], b"two", b"three"]);
    }

    #[test]
    fn a_truncated_or_damaged_body_is_undecodable() {
        let body = encode(b"one\ntwo\n").unwrap();
        for cut in 2..body.len() {
            assert!(matches!(inflate(&body[..cut], CAPS), Err(DecodeError::Undecodable(_))), "{cut}");
        }
        let mut damaged = body.clone();
        let at = body.len() - 5;
        damaged[at] ^= 1;
        assert!(matches!(inflate(&damaged, CAPS), Err(DecodeError::Undecodable(_))));
        assert!(matches!(inflate(b"plain text", CAPS), Err(DecodeError::Undecodable(_))));
        assert!(matches!(
            inflate(&[&body[..], b"trailing"].concat(), CAPS),
            Err(DecodeError::Undecodable(_))
        ));
        assert_eq!(inflate(b"", CAPS).unwrap().len(), 0);
    }

    #[test]
    fn the_caps_are_exact_to_the_byte_and_the_line() {
        let caps = Caps { decoded: 1 << 20, lines: 10 };
        for (size, fits) in [(caps.decoded, true), (caps.decoded + 1, false)] {
            let text = vec![b'x'; size];
            for body in [text.clone(), encode(&text).unwrap()] {
                let coding = Coding::of(None, &body).unwrap();
                let decoded = decode(&body, coding, caps, &mut |_| true);
                assert_eq!(decoded.is_ok(), fits);
                assert!(fits || decoded.unwrap_err() == DecodeError::TooLarge(caps.decoded));
            }
        }
        assert_eq!(inflate(&encode(&b"a\n\n".repeat(10)).unwrap(), caps).unwrap().len(), 10);
        assert_eq!(inflate(&encode(&b"a\n".repeat(11)).unwrap(), caps), Err(DecodeError::TooManyLines(10)));
    }

    #[test]
    fn a_bomb_takes_no_more_memory_than_its_cap() {
        let body = encode(&vec![0; 64 << 20]).unwrap();
        let mut reserved = 0;
        let result = decode(&body, Coding::Gzip, CAPS, &mut |more| {
            reserved += more;
            true
        });
        assert!(matches!(result, Err(DecodeError::TooLarge(_))));
        assert!(reserved <= CAPS.decoded + 2 * STEP, "{reserved}");
    }

    #[test]
    fn a_body_that_was_compressed_twice_is_inflated_twice_under_the_same_caps() {
        let twice = |text: &[u8]| encode(&encode(text).unwrap()).unwrap();
        assert_eq!(inflate(&twice(b"one\ntwo"), CAPS).unwrap(), [&b"one"[..], b"two"]);
        assert!(matches!(inflate(&twice(&vec![0; 2 << 20]), CAPS), Err(DecodeError::TooLarge(_))));
        // The output of the first inflation is bounded too, even if it inflates to nothing.
        let nothing = encode(b"").unwrap().repeat(1 << 20);
        assert_eq!(inflate(&encode(&nothing).unwrap(), CAPS), Err(DecodeError::TooLarge(CAPS.decoded)));
        let mut damaged = encode(b"one").unwrap();
        damaged.truncate(damaged.len() - 1);
        assert!(matches!(inflate(&encode(&damaged).unwrap(), CAPS), Err(DecodeError::Undecodable(_))));
    }

    #[test]
    fn a_refused_reservation_is_reported() {
        let body = encode(&vec![b'x'; 1 << 19]).unwrap();
        let mut left = 300_000usize;
        let result = decode(&body, Coding::Gzip, CAPS, &mut |more| {
            left.checked_sub(more).inspect(|rest| left = *rest).is_some()
        });
        assert_eq!(result.unwrap_err(), DecodeError::NoMemory);
    }
}
