//! How much of what was written to a TCP socket the peer's system has not acknowledged.

use std::io;
use std::net::{SocketAddr, TcpStream};

/// Returns the number of bytes that were written to a TCP socket and that the peer has not
/// acknowledged; none where the system does not tell, or no longer knows the connection.
///
/// Linux's ioctl(SIOCOUTQ) and getsockopt(TCP_INFO) would need unsafe code, and sock_diag(7) a
/// socket family that a sandboxed service has no other need for. /proc/net/tcp has the same number
/// (proc(5): `tx_queue`), a line for each connection of the network namespace; the system generates
/// the lines while they are read, so reading stops at ours.
pub(super) fn unacknowledged(socket: &TcpStream) -> io::Result<Option<u64>> {
    let (local, peer) = (socket.local_addr()?, socket.peer_addr()?);
    let table = if local.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    let (local, peer) = (in_table(local), in_table(peer));
    // A table that changes while it is read can miss a line.
    for _ in 0..3 {
        let Ok(table) = std::fs::File::open(table) else { break };
        match send_queue(io::BufReader::with_capacity(64 * 1024, table), &local, &peer) {
            Ok(None) => {}
            Ok(found) => return Ok(found),
            Err(_) => break,
        }
    }
    Ok(None)
}

fn send_queue(mut table: impl io::BufRead, local: &str, peer: &str) -> io::Result<Option<u64>> {
    let mut line = String::new();
    while table.read_line(&mut line)? > 0 {
        let mut columns = line.split_ascii_whitespace().skip(1);
        if columns.next() == Some(local) && columns.next() == Some(peer) {
            let sending = columns.nth(1).and_then(|queues| queues.split_once(':'));
            return Ok(sending.and_then(|(bytes, _)| u64::from_str_radix(bytes, 16).ok()));
        }
        line.clear();
    }
    Ok(None)
}

/// Formats an address as /proc/net/tcp does: words of 32 bits, each in this machine's byte order.
fn in_table(address: SocketAddr) -> String {
    let word = |octets: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(octets));
    let host: String = match address {
        SocketAddr::V4(address) => word(address.ip().octets()),
        SocketAddr::V6(address) => {
            let octets = address.ip().octets();
            let (words, _) = octets.as_chunks::<4>();
            words.iter().copied().map(word).collect()
        }
    };
    format!("{host}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use super::super::machine;
    use super::*;

    #[test]
    fn the_send_queue_is_found_in_the_systems_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n  \
                     13: 0100007F:D431 0100007F:1F90 01 0000A1B2:00000007 01:00000014 00000000     0\n";
        let found = |table: &str, peer| send_queue(table.as_bytes(), "0100007F:D431", peer).unwrap();
        assert_eq!(found(table, "0100007F:1F90"), Some(0xA1B2));
        assert_eq!(found(table, "0100007F:1F91"), None);
        assert_eq!(found("", "0100007F:1F91"), None);
        if cfg!(target_endian = "little") {
            assert_eq!(in_table(([127, 0, 0, 1], 8080).into()), "0100007F:1F90");
            let address: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
            assert_eq!(in_table(address), "B80D0120000000000000000001000000:0001");
        }
    }

    /// Checks the queue while the peer does not read: its system acknowledges only what fits into
    /// its buffer.
    #[cfg(target_os = "linux")]
    fn assert_queue_is_seen(listener: &TcpListener) {
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        assert_eq!(unacknowledged(&socket).unwrap(), Some(0));
        socket.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(bytes) = (&socket).write(&[b'x'; 65_536]) {
            sent += bytes;
        }
        assert!(unacknowledged(&socket).unwrap().unwrap() > 0);
        let mut all = vec![0; sent];
        peer.read_exact(&mut all).unwrap();
        let start = Instant::now();
        while unacknowledged(&socket).unwrap() != Some(0) {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn bytes_that_the_peer_has_not_acknowledged_are_seen() {
        assert_queue_is_seen(&TcpListener::bind("127.0.0.1:0").unwrap());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn bytes_that_the_peer_has_not_acknowledged_are_seen_over_ipv6() {
        match TcpListener::bind("[::1]:0") {
            Ok(listener) => assert_queue_is_seen(&listener),
            Err(_) => machine::skip("the machine has no ::1"),
        }
    }
}
