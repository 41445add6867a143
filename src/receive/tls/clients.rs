//! Client certificates: mutual TLS (RFC 8446, section 4.4.2), with an optional list of names for an
//! authority that certifies other clients too.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{Error as PemError, PemObject as _};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use x509_cert::Certificate;
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::TlsError;
use crate::net::tls;

/// Creates a verifier of clients' certificates against an authority, and of their names against a
/// list.
///
/// # Errors
/// [`TlsError::ClientCa`].
pub(super) fn verifier(
    ca: &Path,
    names: &[String],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let unusable = |cause: String| TlsError::ClientCa { path: ca.to_owned(), cause };
    let unreadable = |cause: PemError| unusable(super::PemCause::from(cause).to_string());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(unreadable)? {
        roots.add(certificate.map_err(unreadable)?).map_err(|cause| unusable(tls::describe(&cause)))?;
    }
    let inner = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|cause| unusable(cause.to_string()))?;
    if names.is_empty() {
        return Ok(inner);
    }
    Ok(Arc::new(Named { inner, names: names.to_vec() }))
}

/// Verifier that accepts only listed names.
#[derive(Debug)]
struct Named {
    inner: Arc<dyn ClientCertVerifier>,
    names: Vec<String>,
}

/// A client that the authority certified and that is not on the list.
#[derive(Debug, thiserror::Error)]
#[error("the client's certificate has none of the names in client_names; it is for {0}")]
struct UnknownClient(String);

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let names = names(end_entity);
        if names.iter().any(|name| self.names.contains(name)) {
            return Ok(verified);
        }
        let unknown = UnknownClient(names.join(", "));
        Err(CertificateError::Other(OtherError(Arc::new(unknown))).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Returns the names of a certificate: its subject in the notation of RFC 4514, and the DNS names,
/// e-mail addresses and URIs among its alternative names (RFC 5280, section 4.2.1.6).
pub(super) fn names(certificate: &[u8]) -> Vec<String> {
    let Ok(certificate) = Certificate::from_der(certificate) else { return Vec::new() };
    let certificate = certificate.tbs_certificate();
    let subject = certificate.subject().to_string();
    let mut names: Vec<String> = (!subject.is_empty()).then_some(subject).into_iter().collect();
    if let Ok(Some((_, SubjectAltName(alternatives)))) = certificate.get_extension::<SubjectAltName>() {
        names.extend(alternatives.iter().filter_map(|name| match name {
            GeneralName::Rfc822Name(name)
            | GeneralName::DnsName(name)
            | GeneralName::UniformResourceIdentifier(name) => Some(name.as_str().to_owned()),
            _ => None,
        }));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_matched_by_its_subject_and_its_alternative_names() {
        let mut parameters = rcgen::CertificateParams::new(["konnect.example.com".to_owned()]).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "konnect");
        parameters.distinguished_name.push(rcgen::DnType::OrganizationName, "Kong");
        parameters
            .subject_alt_names
            .push(rcgen::SanType::URI("spiffe://kong/konnect".to_owned().try_into().unwrap()));
        let made = parameters.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        let found = names(made.der());
        for name in ["O=Kong,CN=konnect", "konnect.example.com", "spiffe://kong/konnect"] {
            assert!(found.iter().any(|found| found == name), "{name}: {found:?}");
        }
        for cut in 0..made.der().len() {
            let _ = names(&made.der()[..cut]);
        }
        assert_eq!(names(b""), [""; 0]);
    }
}
