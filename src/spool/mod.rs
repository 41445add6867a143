//! The producer's lines on disk until the receiver has them: inputs are read, completed and
//! committed to a ledger, from which one sink posts them.
//!
//! It is the receiver's ledger used the other way. A line and the checkpoint of its input are one
//! transaction, so that after a crash each input is read from where the ledger has it; a line is
//! forgotten only after the receiver's 200.

pub mod input;
