//! Offline verification of saved lines.
//!
//! [`find`] returns which files there are, in the order of their time. [`read`] splits each into
//! blocks of whole lines, inflated where its first bytes say so, or of rows of a database.
//! [`judge`] decides which lines of a block are proved; it opens and verifies them as
//! [`crate::ingest`] does. [`run`] reads and judges on all cores, in bounded memory, and reports in
//! the order of files and lines. [`explain`] examines one line and says why it fails, as far as
//! checking its [`variants`] proves that.

pub mod explain;
pub mod find;
pub mod judge;
pub mod read;
pub mod run;
mod variants;
