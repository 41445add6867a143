//! Sizes and times in the contract's notation, read and written.

use std::time::Duration;

use bytesize::ByteSize;

/// The largest size that can be configured: 1 PiB, far from where sums or semaphores overflow.
pub(super) const MAX_SIZE: u64 = bytesize::PIB;
/// The longest time that can be configured: ten years, far from where adding it to a clock overflows.
pub(super) const MAX_TIME: Duration = Duration::from_secs(3650 * 86_400);

const SIZE_UNITS: [(&str, u64); 4] =
    [("GiB", bytesize::GIB), ("MiB", bytesize::MIB), ("KiB", bytesize::KIB), ("B", 1)];
const TIME_UNITS: [(&str, u128); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads a size in bytes: a number with B, KiB, MiB or GiB, or without a unit; 1 B to [`MAX_SIZE`].
///
/// # Errors
/// What to write instead.
pub(super) fn parse_size(text: &str) -> Result<u64, &'static str> {
    const NOTATION: &str = "write a number and one of B, KiB, MiB, GiB, such as \"8MiB\"";

    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim_start();
    if !unit.is_empty() && !SIZE_UNITS.iter().any(|(known, _)| *known == unit) {
        return Err(NOTATION);
    }
    match text.parse::<ByteSize>().map_err(|_| NOTATION)?.as_u64() {
        0 => Err("write at least 1B, for nothing could pass a limit of zero"),
        bytes if bytes > MAX_SIZE => Err("write at most 1048576GiB"),
        bytes => Ok(bytes),
    }
}

/// Writes a size so that [`parse_size`] reads the same: whole, in the largest unit that keeps it whole.
pub(crate) fn display_size(bytes: u64) -> String {
    let unit = SIZE_UNITS.iter().find(|(_, factor)| bytes != 0 && bytes.is_multiple_of(*factor));
    let (unit, factor) = unit.unwrap_or(&("B", 1));
    format!("{}{unit}", bytes / factor)
}

/// Reads a time: numbers with ms, s, m, h or d; 1 ms to [`MAX_TIME`], in whole milliseconds.
///
/// # Errors
/// What to write instead.
pub(super) fn parse_time(text: &str) -> Result<Duration, &'static str> {
    const NOTATION: &str = "write a number and one of ms, s, m, h, d, such as \"30s\"";

    let mut units = text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty());
    if !units.all(|unit| TIME_UNITS.iter().any(|(known, _)| *known == unit)) {
        return Err(NOTATION);
    }
    match humantime::parse_duration(text).map_err(|_| NOTATION)? {
        Duration::ZERO => Err("write at least 1ms, for zero makes no sense here"),
        time if time > MAX_TIME => Err("write at most 3650d"),
        time if time.subsec_nanos() % 1_000_000 != 0 => Err("write whole milliseconds"),
        time => Ok(time),
    }
}

/// Writes a time so that [`parse_time`] reads the same: whole, in the largest unit that keeps it whole.
pub(crate) fn display_time(time: Duration) -> String {
    let milliseconds = time.as_millis();
    let unit =
        TIME_UNITS.iter().find(|(_, factor)| milliseconds != 0 && milliseconds.is_multiple_of(*factor));
    let (unit, factor) = unit.unwrap_or(&("ms", 1));
    format!("{}{unit}", milliseconds / factor)
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
            assert_eq!(parse_time(text), Ok(Duration::from_millis(milliseconds)), "{text}");
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
        assert_eq!(display_time(Duration::from_secs(90)), "90s");
        assert_eq!(display_time(Duration::from_secs(8 * 86_400)), "8d");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_the_same(bytes in 1..=MAX_SIZE, milliseconds in 1..315_360_000_000u64) {
            prop_assert_eq!(parse_size(&display_size(bytes)), Ok(bytes));
            let time = Duration::from_millis(milliseconds);
            prop_assert_eq!(parse_time(&display_time(time)), Ok(time));
        }
    }
}
