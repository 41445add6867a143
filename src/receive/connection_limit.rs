//! The limit of connections, and which one is evicted when there are too many.
//!
//! A connection is unauthenticated until it has shown a valid token. At most half of the
//! connections are unauthenticated, and each address has a share of these; the other half is kept
//! for authenticated ones. A new connection beyond that evicts the oldest unauthenticated one: of
//! its own address if that has too many, else of the address that has the most, so that a flood
//! evicts itself before it evicts others. When there is none, the authenticated connection that has
//! been idle longest is evicted; when none is idle, the new connection waits, for every request has
//! its deadlines.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::sleep;

/// Time that an unauthenticated connection may need to show its token. Where younger ones are
/// evicted, new connections are accepted no faster than [`BURST`] in [`BURST_DELAY`], so that a
/// genuine one among a flood from its own address has some time, and yet the kernel's whole queue
/// is accepted within a second.
const YOUNG: Duration = Duration::from_millis(100);
const BURST: u64 = 8;
const BURST_DELAY: Duration = Duration::from_millis(1);

/// The limit. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ConnectionLimit {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Notified of a change that a new connection or the drain may wait for.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// Maximum number of connections.
    all: usize,
    /// Maximum number of unauthenticated connections of one address.
    per_peer: usize,
    /// Increases, so that an older connection has a smaller number.
    next: u64,
    connections: BTreeMap<u64, Connection>,
    /// Number of unauthenticated connections that were evicted while they were young.
    evicted_young: u64,
}

#[derive(Debug)]
struct Connection {
    network: IpAddr,
    since: Instant,
    is_authenticated: bool,
    /// Time at which it became idle, on the scale of [`State::next`]; none while a request is in
    /// progress.
    idle_since: Option<u64>,
    evict: oneshot::Sender<Evicted>,
}

/// Reason why a connection was evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evicted {
    /// There were too many connections.
    TooMany,
    /// There were too many unauthenticated connections of its address.
    PerPeer,
}

/// One connection's permit, released when it is dropped.
#[derive(Debug)]
pub struct ConnectionPermit {
    shared: Arc<Shared>,
    peer: IpAddr,
    /// The client behind the peer, if that is a proxy.
    client: OnceLock<IpAddr>,
    number: u64,
}

impl ConnectionLimit {
    /// Creates a limit of `all` connections, at least 1; half of these may be unauthenticated, and
    /// `per_peer` of these from one address.
    pub fn new(all: usize, per_peer: usize) -> Self {
        let (all, per_peer) = (all.max(1), per_peer.max(1));
        let state = State { all, per_peer, next: 0, connections: BTreeMap::new(), evicted_young: 0 };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), changed: Notify::new() }) }
    }

    /// Changes the parameters of [`ConnectionLimit::new`]. Where there are more connections than
    /// that, none is evicted until the next new one, which then waits.
    pub fn resize(&self, all: usize, per_peer: usize) {
        let mut state = self.shared.state.lock();
        (state.all, state.per_peer) = (all.max(1), per_peer.max(1));
        self.shared.changed.notify_one();
    }

    /// Waits until a new connection is within the limit. `peer` is its address in canonical form.
    /// Returns its permit, and a receiver that reports its eviction. One caller at a time.
    ///
    /// A proxy may have any number of connections: [`ConnectionPermit::set_client`] sets whose
    /// share each counts against.
    pub async fn admit(
        &self,
        peer: IpAddr,
        is_proxy: bool,
    ) -> (ConnectionPermit, oneshot::Receiver<Evicted>) {
        loop {
            let changed = self.shared.changed.notified();
            let before = self.shared.state.lock().evicted_young;
            let admitted = self.try_admit(peer, is_proxy);
            let evicted_young = self.shared.state.lock().evicted_young;
            if evicted_young > before && evicted_young.is_multiple_of(BURST) {
                sleep(BURST_DELAY).await;
            }
            match admitted {
                Some(admitted) => return admitted,
                None => changed.await,
            }
        }
    }

    fn try_admit(
        &self,
        peer: IpAddr,
        is_proxy: bool,
    ) -> Option<(ConnectionPermit, oneshot::Receiver<Evicted>)> {
        let network = network(peer);
        let mut state = self.shared.state.lock();
        if !is_proxy {
            state.evict_excess(network, 1);
        }
        while state.connections.len() >= state.all
            || state.unauthenticated().count() >= state.all - state.all / 2
        {
            let victim = state.oldest_of_the_most().or_else(|| state.longest_idle())?;
            state.evict(victim, Evicted::TooMany);
        }
        let number = state.tick();
        let (evict, evicted) = oneshot::channel();
        let (since, idle_since, is_authenticated) = (Instant::now(), None, false);
        state.connections.insert(number, Connection { network, since, is_authenticated, idle_since, evict });
        let shared = Arc::clone(&self.shared);
        Some((ConnectionPermit { shared, peer, client: OnceLock::new(), number }, evicted))
    }

    /// Evicts a connection, because the system is short of descriptors.
    pub fn evict_one(&self) {
        let mut state = self.shared.state.lock();
        if let Some(victim) = state.oldest_of_the_most().or_else(|| state.longest_idle()) {
            state.evict(victim, Evicted::TooMany);
        }
    }

    /// Waits until there is no connection.
    pub async fn wait_until_empty(&self) {
        loop {
            let changed = self.shared.changed.notified();
            if self.shared.state.lock().connections.is_empty() {
                return;
            }
            changed.await;
        }
    }

    /// Returns the number of connections, and how many of them are authenticated.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.shared.state.lock();
        (state.connections.len(), state.connections.len() - state.unauthenticated().count())
    }
}

impl ConnectionPermit {
    /// Returns the peer's address, as it was given, or that of the client behind it.
    pub fn peer(&self) -> IpAddr {
        *self.client.get().unwrap_or(&self.peer)
    }

    /// Records that the peer is a proxy, and the connection is this client's. Where the client has
    /// too many, its oldest is evicted.
    pub fn set_client(&self, client: IpAddr) {
        let _ = self.client.set(client);
        let network = network(client);
        let mut state = self.shared.state.lock();
        if let Some(connection) = state.connections.get_mut(&self.number) {
            connection.network = network;
            state.evict_excess(network, 0);
        }
    }

    /// Records that the connection has shown a valid token, and is in use.
    pub fn authenticated(&self) {
        self.change(|connection, _| connection.is_authenticated = true);
    }

    /// Records whether the connection waits for its next request. An idle one may be evicted.
    pub fn idle(&self, is_idle: bool) {
        self.change(|connection, now| connection.idle_since = is_idle.then_some(now));
    }

    fn change(&self, change: impl FnOnce(&mut Connection, u64)) {
        let mut state = self.shared.state.lock();
        let now = state.tick();
        if let Some(connection) = state.connections.get_mut(&self.number) {
            change(connection, now);
        }
        self.shared.changed.notify_one();
    }

    /// Returns whether it has shown a valid token.
    pub fn is_authenticated(&self) -> bool {
        self.shared.state.lock().connections.get(&self.number).is_some_and(|known| known.is_authenticated)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.shared.state.lock().connections.remove(&self.number);
        self.shared.changed.notify_one();
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn unauthenticated(&self) -> impl Iterator<Item = (u64, &Connection)> {
        let all = self.connections.iter().map(|(number, connection)| (*number, connection));
        all.filter(|(_, connection)| !connection.is_authenticated)
    }

    /// Evicts unauthenticated connections of an address until `more` fit.
    fn evict_excess(&mut self, network: IpAddr, more: usize) {
        let mut of_it = self.unauthenticated().filter(|(_, connection)| connection.network == network);
        let Some((oldest, _)) = of_it.next() else { return };
        if of_it.count() + 1 + more > self.per_peer {
            self.evict(oldest, Evicted::PerPeer);
            self.evict_excess(network, more);
        }
    }

    /// Returns the oldest unauthenticated connection of the addresses that have the most.
    fn oldest_of_the_most(&self) -> Option<u64> {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for (_, connection) in self.unauthenticated() {
            *counts.entry(connection.network).or_default() += 1;
        }
        let most = counts.values().max();
        let mut of_them =
            self.unauthenticated().filter(|(_, connection)| counts.get(&connection.network) == most);
        of_them.next().map(|(number, _)| number)
    }

    /// Returns the authenticated connection that has been idle longest.
    fn longest_idle(&self) -> Option<u64> {
        let idle = self.connections.iter().filter(|(_, connection)| connection.is_authenticated);
        let idle = idle.filter_map(|(number, connection)| Some((connection.idle_since?, *number)));
        idle.min().map(|(_, number)| number)
    }

    fn evict(&mut self, number: u64, why: Evicted) {
        if let Some(connection) = self.connections.remove(&number) {
            let is_young = !connection.is_authenticated && connection.since.elapsed() < YOUNG;
            self.evicted_young += u64::from(is_young);
            // A connection that has just ended has dropped its receiver.
            let _ = connection.evict.send(why);
        }
    }
}

/// Returns the network that counts as one address: IPv6 hosts have a whole /64 to choose from (RFC
/// 6177).
fn network(peer: IpAddr) -> IpAddr {
    match peer {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    /// More than an admission takes that does not wait.
    const AT_ONCE: Duration = Duration::from_millis(5);

    type Held = Vec<(ConnectionPermit, oneshot::Receiver<Evicted>)>;

    fn peer(number: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, number])
    }

    async fn admit(limit: &ConnectionLimit, number: u8) -> (ConnectionPermit, oneshot::Receiver<Evicted>) {
        timeout(AT_ONCE, limit.admit(peer(number), false)).await.expect("admitted")
    }

    /// Removes evicted connections, and returns which they were.
    fn evicted(held: &mut Held) -> Vec<(usize, Evicted)> {
        let tell =
            |(at, (_, told)): (usize, &mut (_, oneshot::Receiver<_>))| Some((at, told.try_recv().ok()?));
        let gone: Vec<_> = held.iter_mut().enumerate().filter_map(tell).collect();
        for (at, _) in gone.iter().rev() {
            drop(held.remove(*at));
        }
        gone
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_unauthenticated_connection_is_evicted() {
        let limit = ConnectionLimit::new(8, 100);
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(admit(&limit, 1).await);
        }
        assert_eq!(evicted(&mut held), []);
        // Half of the limit is for those; beyond it, the oldest of the address with the most
        // connections is evicted.
        for number in [1, 2, 2] {
            held.push(admit(&limit, number).await);
            assert_eq!(evicted(&mut held), [(0, Evicted::TooMany)]);
        }
        assert_eq!(limit.counts(), (4, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_evicts_its_own_connections() {
        let limit = ConnectionLimit::new(20, 3);
        let mut held = vec![admit(&limit, 2).await];
        for _ in 0..4 {
            held.push(admit(&limit, 1).await);
        }
        assert_eq!(evicted(&mut held), [(1, Evicted::PerPeer)]);
        // Authenticated ones do not count.
        held.iter().for_each(|(permit, _)| permit.authenticated());
        for _ in 0..4 {
            held.push(admit(&limit, 1).await);
        }
        assert_eq!(evicted(&mut held), [(4, Evicted::PerPeer)]);
        assert_eq!(limit.counts(), (7, 4));
        // The flood of one address evicts no others.
        for number in [3, 3, 3, 4, 5, 6, 7, 8] {
            held.push(admit(&limit, number).await);
        }
        assert_eq!(evicted(&mut held), [(4, Evicted::TooMany)]);
    }

    #[tokio::test(start_paused = true)]
    async fn each_client_of_a_proxy_has_its_own_share() {
        let limit = ConnectionLimit::new(100, 2);
        let mut held = Vec::new();
        for client in [7, 8, 7, 8, 7] {
            let (permit, told) = timeout(AT_ONCE, limit.admit(peer(1), true)).await.expect("admitted");
            permit.set_client(peer(client));
            assert_eq!(permit.peer(), peer(client));
            held.push((permit, told));
        }
        assert_eq!(evicted(&mut held), [(0, Evicted::PerPeer)]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_authenticated_connection_is_evicted_only_when_idle() {
        let limit = ConnectionLimit::new(4, 100);
        let mut held = Vec::new();
        for _ in 0..4 {
            let (permit, told) = admit(&limit, 1).await;
            permit.authenticated();
            held.push((permit, told));
        }
        assert_eq!(limit.counts(), (4, 4));
        assert!(timeout(AT_ONCE, limit.admit(peer(1), false)).await.is_err(), "all are busy");
        held[2].0.idle(true);
        held[1].0.idle(true);
        held.push(admit(&limit, 1).await);
        assert_eq!(evicted(&mut held), [(2, Evicted::TooMany)]);
        // An unauthenticated one is evicted before any of them.
        held.push(admit(&limit, 1).await);
        assert_eq!(evicted(&mut held), [(3, Evicted::TooMany)]);
        assert!(held[0].0.is_authenticated());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_connection_waits_until_another_is_idle_or_closed() {
        let limit = ConnectionLimit::new(1, 1);
        let (only, _told) = admit(&limit, 1).await;
        only.authenticated();
        let admission = limit.admit(peer(2), false);
        tokio::pin!(admission);
        assert!(timeout(AT_ONCE, &mut admission).await.is_err());
        only.idle(true);
        let (second, _told) = timeout(AT_ONCE, admission).await.expect("at once");
        second.authenticated();
        let admission = limit.admit(peer(2), false);
        tokio::pin!(admission);
        assert!(timeout(AT_ONCE, &mut admission).await.is_err());
        assert!(timeout(AT_ONCE, limit.wait_until_empty()).await.is_err());
        drop(second);
        drop(timeout(AT_ONCE, admission).await.expect("at once"));
        limit.wait_until_empty().await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_can_be_raised_and_lowered() {
        let limit = ConnectionLimit::new(4, 100);
        let mut held = vec![admit(&limit, 1).await, admit(&limit, 1).await];
        limit.resize(8, 100);
        held.push(admit(&limit, 2).await);
        // None is evicted before the next new connection, then as many as necessary.
        limit.resize(2, 100);
        assert_eq!(evicted(&mut held), []);
        held.push(admit(&limit, 3).await);
        assert_eq!(evicted(&mut held).len(), 3);
        // The share of an address changes too.
        limit.resize(100, 2);
        held = vec![admit(&limit, 1).await, admit(&limit, 1).await, admit(&limit, 1).await];
        assert_eq!(evicted(&mut held), [(0, Evicted::PerPeer)]);
        limit.resize(100, 3);
        held.push(admit(&limit, 1).await);
        assert_eq!(evicted(&mut held), []);
    }

    #[test]
    fn an_address_is_a_network() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"));
        assert!(!same("2001:db8:1:2::1", "2001:db8:1:3::1"));
        assert!(!same("192.0.2.1", "192.0.2.2"));
    }
}
