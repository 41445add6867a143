//! The PROXY header that a balancer sends before a connection's first bytes to name its client
//! (<https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>, versions 1 and 2).

use std::io;
use std::net::IpAddr;

use proxy_header::{ParseConfig, ProxyHeader};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Beginning of a header of version 2, and the length of its part before the addresses (section
/// 2.2).
const SIGNATURE_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
const FIXED_V2: usize = 16;

/// Maximum length of a header of version 1, its end of line included (section 2.1).
const LONGEST_V1: usize = 107;

/// Maximum length of what follows the fixed part of version 2: addresses and a few extensions.
const LONGEST_V2: usize = 4096;

/// Reads the header, and nothing behind it. Returns the address of the client; none when the proxy
/// does not name it, as in its own health checks.
///
/// # Errors
/// When there is no header, or it is malformed.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<IpAddr>> {
    let malformed = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    // The shortest header is longer.
    let mut header = vec![0; SIGNATURE_V2.len()];
    stream.read_exact(&mut header).await?;
    if header == SIGNATURE_V2 {
        header.resize(FIXED_V2, 0);
        stream.read_exact(&mut header[SIGNATURE_V2.len()..]).await?;
        let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
        if length > LONGEST_V2 {
            return Err(malformed(format!("{length} bytes of addresses")));
        }
        header.resize(FIXED_V2 + length, 0);
        stream.read_exact(&mut header[FIXED_V2..]).await?;
    } else if header.starts_with(b"PROXY ") {
        while !header.ends_with(b"\r\n") {
            if header.len() >= LONGEST_V1 {
                return Err(malformed("it has no end".to_owned()));
            }
            header.push(stream.read_u8().await?);
        }
    } else {
        return Err(malformed("there is none".to_owned()));
    }
    let config = ParseConfig { include_tlvs: false, allow_v1: true, allow_v2: true };
    let (parsed, _) = ProxyHeader::parse(&header, config).map_err(|error| malformed(error.to_string()))?;
    Ok(parsed.proxied_address().map(|addresses| addresses.source.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a header, and returns the result and the bytes behind it.
    async fn read_from(bytes: &[u8]) -> (io::Result<Option<IpAddr>>, Vec<u8>) {
        let mut rest = bytes;
        let result = read(&mut rest).await;
        (result, rest.to_vec())
    }

    fn v2_header(command: u8, family: u8, addresses: &[u8]) -> Vec<u8> {
        let length = u16::try_from(addresses.len()).unwrap().to_be_bytes();
        [SIGNATURE_V2, &[command, family], &length, addresses].concat()
    }

    #[tokio::test]
    async fn both_versions_give_the_client_and_leave_the_rest() {
        let ipv4 = v2_header(0x21, 0x11, &[192, 0, 2, 7, 10, 0, 0, 1, 1, 2, 3, 4]);
        // With an extension behind the addresses.
        let extended = v2_header(0x21, 0x11, &[192, 0, 2, 7, 10, 0, 0, 1, 1, 2, 3, 4, 4, 0, 2, 0, 0]);
        let ipv6 = v2_header(0x21, 0x21, &[[0x20, 1, 0xd, 0xb8].as_slice(), &[0; 31], &[1]].concat());
        for (header, client) in [
            (&b"PROXY TCP4 192.0.2.7 10.0.0.1 56324 443\r\n"[..], Some("192.0.2.7")),
            (b"PROXY TCP6 2001:db8::7 ::1 56324 443\r\n", Some("2001:db8::7")),
            (b"PROXY UNKNOWN\r\n", None),
            (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
            (&ipv4, Some("192.0.2.7")),
            (&extended, Some("192.0.2.7")),
            (&ipv6, Some("2001:db8::")),
            (&v2_header(0x20, 0x00, &[]), None),
            (&v2_header(0x21, 0x00, &[]), None),
        ] {
            let (result, rest) = read_from(&[header, b"\x16\x03\x01"].concat()).await;
            assert_eq!(result.unwrap(), client.map(|client| client.parse().unwrap()));
            assert_eq!(rest, b"\x16\x03\x01");
        }
    }

    #[tokio::test]
    async fn bytes_that_are_not_a_header_are_refused() {
        let long = format!("PROXY TCP4 {}", "1".repeat(200));
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00"[..],
            b"POST / HTTP/1.1\r\n",
            b"PROXY TCP4 192.0.2.7\r\n and more",
            b"PROXY TCP4 192.0.2.300 10.0.0.1 1 2\r\n",
            b"PROXY TCP4 192.0.2.7 10.0.0.1 56324",
            b"PROXY",
            b"",
            long.as_bytes(),
            &v2_header(0x31, 0x11, &[0; 12]),
            &v2_header(0x21, 0x11, &[0; 11]),
            &v2_header(0x21, 0x11, &[0; 5000]),
        ] {
            assert!(read_from(bytes).await.0.is_err(), "{bytes:?}");
        }
    }
}
