//! The mark: the file, and the byte in it before which everything is safe.
//!
//! An inode's number is given to another file as soon as its own is removed, and a device's number
//! changes when the machine starts. So the mark holds a digest of the last bytes before the safe
//! one: the file that has them is the file of the mark.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) inode: u64,
    pub(super) safe: u64,
    /// None in marks of version 1.
    digest: Option<[u8; 32]>,
}

/// Version 2 is its number, the inode, the safe byte and an unused number (little-endian, 8 bytes
/// each), and the digest. Version 1 was the device, the inode and the safe byte, without a number.
const VERSION: u8 = 2;

impl Mark {
    pub(super) fn of(file: &File, inode: u64, safe: u64) -> io::Result<Self> {
        Ok(Self { inode, safe, digest: Some(digest(file, safe)?) })
    }

    pub(super) fn read(mark: &[u8]) -> Option<Self> {
        let number = u64::from_le_bytes;
        if let (&[_device, inode, safe], []) = mark.as_chunks::<8>() {
            return Some(Self { inode: number(inode), safe: number(safe), digest: None });
        }
        let (numbers, digest) = mark.strip_prefix(&[VERSION])?.split_at_checked(24)?;
        let (&[inode, safe, _unused], []) = numbers.as_chunks::<8>() else { return None };
        Some(Self { inode: number(inode), safe: number(safe), digest: Some(digest.try_into().ok()?) })
    }

    pub(super) fn write(self) -> Vec<u8> {
        let numbers = [self.inode, self.safe, 0].map(u64::to_le_bytes).concat();
        [&[VERSION], numbers.as_slice(), &self.digest.unwrap_or_default()].concat()
    }

    /// Returns whether the file has the bytes of which the mark has a digest; none where there is
    /// nothing to compare: for a mark of version 1, before the first byte, and in a file that ends
    /// before the safe byte.
    pub(super) fn fits(&self, file: &File, length: u64) -> io::Result<Option<bool>> {
        match self.digest {
            Some(known) if (1..=length).contains(&self.safe) => Ok(Some(digest(file, self.safe)? == known)),
            _ => Ok(None),
        }
    }
}

/// Returns the digest of the last bytes of a file before an offset.
pub(super) fn digest(file: &File, before: u64) -> io::Result<[u8; 32]> {
    const MOST: u64 = 4096;
    let length = before.min(MOST);
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, before - length)?;
    Ok(*blake3::hash(&bytes).as_bytes())
}
