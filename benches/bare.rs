//! The baseline of the benchmarks: batch verification and nothing else, on as many threads as there
//! are cores.

use auditgate::trust::verify::{Claim, verify_in_batches};
use ed25519_dalek::SigningKey;

/// Verifies lines in batches of that many; every line must verify.
pub(crate) fn verify_all<L: Sync>(
    key: &SigningKey,
    lines: &[L],
    together: usize,
    claim: impl Fn(&L) -> Claim<'_> + Copy + Send,
) {
    let public = [key.verifying_key().to_bytes()];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for part in lines.chunks(lines.len().div_ceil(threads)) {
            scope.spawn(move || {
                for batch in part.chunks(together) {
                    let claims: Vec<_> = batch.iter().map(claim).collect();
                    let fits = verify_in_batches(&claims, &public, together, &mut rand::rng());
                    assert!(fits.iter().all(Option::is_some));
                }
            });
        }
    });
}
