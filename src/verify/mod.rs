//! Saved lines are checked again, offline, by whoever has the keys.
//!
//! [`find`] says which files there are, in the order of their time. [`read`] takes each apart into blocks of whole
//! lines, inflated where its first bytes say so, or of rows of a database. [`judge`] tells of the lines of a block
//! which prove themselves; it opens and verifies them as [`crate::ingest`] does. [`run`] reads and judges on all
//! cores, in bounded memory, and reports in the order of files and lines. [`explain`] looks at one line and says
//! why it fails, as far as checking it again in another spelling ([`variants`]) proves that.

pub mod explain;
pub mod find;
pub mod judge;
pub mod read;
pub mod run;
mod variants;
