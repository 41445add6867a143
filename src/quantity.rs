//! Notation of options: sizes, times and counts for serde's `with`, and types that have a text
//! form.

use std::time::Duration;

use bytesize::ByteSize;
use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::{Serialize, Serializer};

/// The largest size that can be configured: 1 PiB, far from where sums or semaphores overflow.
const MAX_SIZE: u64 = bytesize::PIB;
/// The longest time that can be configured: ten years, far from where adding it to a clock
/// overflows.
const MAX_TIME: Duration = Duration::from_secs(3650 * 86_400);

const SIZE_UNITS: [(&str, u64); 4] =
    [("GiB", bytesize::GIB), ("MiB", bytesize::MIB), ("KiB", bytesize::KIB), ("B", 1)];
const TIME_UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// The type of an option that is a number of bytes, of milliseconds, or of things; `None` is not
/// written.
pub(crate) trait Quantity: Sized {
    /// Returns the number as this type; `None` when it does not fit.
    fn from_number(number: u64) -> Option<Self>;
    /// Returns the number to write, if any.
    fn number(&self) -> Option<u64>;
}

impl Quantity for u64 {
    fn from_number(number: u64) -> Option<Self> {
        Some(number)
    }

    fn number(&self) -> Option<u64> {
        Some(*self)
    }
}

impl Quantity for usize {
    fn from_number(number: u64) -> Option<Self> {
        number.try_into().ok()
    }

    fn number(&self) -> Option<u64> {
        (*self).try_into().ok()
    }
}

impl Quantity for Duration {
    fn from_number(milliseconds: u64) -> Option<Self> {
        Some(Self::from_millis(milliseconds))
    }

    fn number(&self) -> Option<u64> {
        self.as_millis().try_into().ok()
    }
}

impl<T: Quantity> Quantity for Option<T> {
    fn from_number(number: u64) -> Option<Self> {
        T::from_number(number).map(Some)
    }

    fn number(&self) -> Option<u64> {
        self.as_ref().and_then(T::number)
    }
}

fn quantity<T: Quantity, E: Error>(number: Result<u64, String>) -> Result<T, E> {
    let too_large = "more than this machine can address; write a smaller size";
    number.and_then(|number| T::from_number(number).ok_or(too_large.to_owned())).map_err(E::custom)
}

/// A number of bytes with B, KiB, MiB or GiB, or without a unit; from 1 B to 1 PiB.
pub(crate) mod size {
    use super::*;

    #[derive(serde::Deserialize)]
    #[serde(untagged, expecting = "not a size; write a number and one of B, KiB, MiB, GiB, such as \"8MiB\"")]
    enum Written {
        Bytes(i64),
        Text(String),
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: Quantity>(written: D) -> Result<T, D::Error> {
        quantity(match Written::deserialize(written)? {
            Written::Bytes(bytes) => parse_size(&bytes.to_string()),
            Written::Text(text) => parse_size(&text),
        })
    }

    pub(crate) fn serialize<S: Serializer, T: Quantity>(size: &T, out: S) -> Result<S::Ok, S::Error> {
        size.number().map(display_size).serialize(out)
    }
}

/// A time with ms, s, m, h or d; from 1 ms to 3650 d, in whole milliseconds.
pub(crate) mod time {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: Quantity>(written: D) -> Result<T, D::Error> {
        quantity(parse_time(&String::deserialize(written)?))
    }

    pub(crate) fn serialize<S: Serializer, T: Quantity>(time: &T, out: S) -> Result<S::Ok, S::Error> {
        time.number().map(display_time).serialize(out)
    }
}

/// A whole number from 1 to `u32::MAX`.
pub(crate) mod count {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, T: Quantity>(written: D) -> Result<T, D::Error> {
        let number = i64::deserialize(written)?;
        let count = u32::try_from(number).ok().filter(|count| *count > 0).map(u64::from);
        let wrong = || format!("{number} is out of range; write a whole number from 1 to {}", u32::MAX);
        quantity(count.ok_or_else(wrong))
    }

    pub(crate) fn serialize<S: Serializer, T: Quantity>(count: &T, out: S) -> Result<S::Ok, S::Error> {
        count.number().serialize(out)
    }
}

/// The permission bits of a file: an octal text that lets the owner write.
pub(crate) mod octal {
    use super::*;

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(written: D) -> Result<u32, D::Error> {
        parsed(written, |text| {
            let mode = u32::from_str_radix(text, 8).ok().filter(|mode| (0o200..=0o777).contains(mode));
            mode.ok_or_else(|| format!("`{text}` is not a file mode; write an octal text such as \"0640\""))
        })
    }

    pub(crate) fn serialize<S: Serializer>(mode: &u32, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(&format_args!("{mode:04o}"))
    }
}

/// Reads a text by its parser, whose error says what is wrong and, behind `; `, what to write
/// instead.
pub(crate) fn parsed<'de, D: Deserializer<'de>, T, E: std::fmt::Display>(
    written: D,
    parse: impl Fn(&str) -> Result<T, E>,
) -> Result<T, D::Error> {
    parse(&String::deserialize(written)?).map_err(D::Error::custom)
}

/// Lets serde read a type by its parser, as [`parsed`] does, and write it by its `Display`.
macro_rules! by_text {
    ($type:ty, $parse:expr) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(written: D) -> Result<Self, D::Error> {
                $crate::quantity::parsed(written, $parse)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
                out.collect_str(self)
            }
        }
    };
}
pub(crate) use by_text;

fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = |instead: &str| Err(format!("`{text}` is not a size; {instead}"));
    let notation = || wrong("write a number and one of B, KiB, MiB, GiB, such as \"8MiB\"");
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim_start();
    if !unit.is_empty() && !SIZE_UNITS.iter().any(|(known, _)| *known == unit) {
        return notation();
    }
    match text.parse::<ByteSize>().map(|size| size.as_u64()) {
        Err(_) => notation(),
        Ok(0) => wrong("write at least 1B, for nothing could pass a limit of zero"),
        Ok(bytes) if bytes > MAX_SIZE => wrong("write at most 1048576GiB"),
        Ok(bytes) => Ok(bytes),
    }
}

/// Writes a size in bytes as it is read: whole, in the largest unit that keeps it whole.
pub(crate) fn display_size(bytes: u64) -> String {
    display(bytes, SIZE_UNITS)
}

fn parse_time(text: &str) -> Result<u64, String> {
    let wrong = |instead: &str| Err(format!("`{text}` is not a time; {instead}"));
    let notation = || wrong("write a number and one of ms, s, m, h, d, such as \"30s\"");
    let mut units = text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty());
    if !units.all(|unit| TIME_UNITS.iter().any(|(known, _)| *known == unit)) {
        return notation();
    }
    match humantime::parse_duration(text) {
        Err(_) => notation(),
        Ok(Duration::ZERO) => wrong("write at least 1ms, for zero makes no sense here"),
        Ok(time) if time > MAX_TIME => wrong("write at most 3650d"),
        Ok(time) if time.subsec_nanos() % 1_000_000 != 0 => wrong("write whole milliseconds"),
        Ok(time) => Ok(time.number().unwrap_or(u64::MAX)),
    }
}

fn display_time(milliseconds: u64) -> String {
    display(milliseconds, TIME_UNITS)
}

fn display<const UNITS: usize>(number: u64, units: [(&str, u64); UNITS]) -> String {
    let whole = units.iter().find(|(_, factor)| number != 0 && number.is_multiple_of(*factor));
    let (unit, factor) = whole.unwrap_or(&units[UNITS - 1]);
    format!("{}{unit}", number / factor)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_take_the_four_units_or_none() {
        for (text, bytes) in [
            ("1", 1),
            ("512B", 512),
            ("256KiB", 256 << 10),
            ("8MiB", 8 << 20),
            ("4 GiB", 4 << 30),
            ("1.5MiB", 3 << 19),
            ("1048576GiB", MAX_SIZE),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "8MB", "8mib", "8M", "8kB", "1TiB", "-1", "1e3", "1.2.3KiB", "0", "0GiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert!(parse_size("1048577GiB").is_err());
        assert!(parse_size("99999999999999999999GiB").is_err());
    }

    #[test]
    fn times_take_the_five_units() {
        for (text, milliseconds) in [
            ("250ms", 250),
            ("30s", 30_000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("1h 30m", 5_400_000),
            ("1.5h", 5_400_000),
            ("8d", 691_200_000),
        ] {
            assert_eq!(parse_time(text), Ok(milliseconds), "{text}");
        }
        for text in ["", "30", "1w", "1M", "1y", "1us", "1sec", "2days", "-1s", "s", "0", "0s", "0.0001s"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
        assert!(parse_time("3651d").is_err());
        assert!(parse_time("99999999999999999999d").is_err());
    }

    #[test]
    fn the_largest_whole_unit_is_written() {
        assert_eq!(display_size(8 << 20), "8MiB");
        assert_eq!(display_size((8 << 20) + 1), "8388609B");
        assert_eq!(display_time(90_000), "90s");
        assert_eq!(display_time(8 * 86_400_000), "8d");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_the_same(bytes in 1..=MAX_SIZE, milliseconds in 1..315_360_000_000u64) {
            prop_assert_eq!(parse_size(&display_size(bytes)), Ok(bytes));
            prop_assert_eq!(parse_time(&display_time(milliseconds)), Ok(milliseconds));
        }
    }
}
