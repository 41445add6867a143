//! Certificates to try things out with: an authority, and a server certificate that it issued.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// PEM texts of an authority and a server certificate; both last a year. The authority's key is
/// dropped, so that nothing else can be issued from it.
pub struct TestCa {
    /// The authority's certificate.
    pub authority: String,
    /// The server's certificate, then its issuer's.
    pub chain: String,
    /// The key of the server's certificate.
    pub key: String,
}

/// Makes an authority and a certificate for these host names and IP addresses, the first of which
/// is also the subject.
///
/// # Errors
/// When a name cannot stand in a certificate.
pub fn make(names: &[&str]) -> Result<TestCa, rcgen::Error> {
    let year = time::OffsetDateTime::now_utc() + time::Duration::days(365);
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "auditgate test CA");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    authority.not_after = year;
    let authority_key = KeyPair::generate()?;
    let authority_certificate = authority.self_signed(&authority_key)?.pem();
    let issuer = Issuer::new(authority, authority_key);
    let mut distinct: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
    distinct.dedup();
    let mut server = CertificateParams::new(distinct)?;
    server.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or_default());
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server.not_after = year;
    let server_key = KeyPair::generate()?;
    let chain = format!("{}{authority_certificate}", server.signed_by(&server_key, &issuer)?.pem());
    Ok(TestCa { authority: authority_certificate, chain, key: server_key.serialize_pem() })
}
