//! Who may be connected at a time, and who goes when it becomes crowded.
//!
//! A connection is a stranger until it has shown a valid token. Strangers have half of the places at most, and each
//! address only a few of these; the other half is kept for those who have shown one. When a newcomer finds no
//! place, the oldest stranger goes: of his own address if that has too many, else of the address that has the most,
//! so that a flood displaces itself before it displaces others. When there is no stranger to go, the connection
//! goes that has been idle longest; when none is idle, the newcomer waits, for every request has its deadlines.
//!
//! The number of connections is strict: a newcomer gets his place when the one before has left it.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep;

/// A stranger may need so long to show its token. Where younger ones have to leave, newcomers come in no faster than
/// [`BURST`] in [`BREATH`], so that a genuine one among a flood from its own address has some time, and yet the
/// kernel's whole queue is through within a second.
const YOUNG: Duration = Duration::from_millis(100);
const BURST: u64 = 8;
const BREATH: Duration = Duration::from_millis(1);

/// All places. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Places {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something changed that a newcomer or the drain may wait for.
    changed: Notify,
}

/// How many there may be.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Of all connections.
    all: usize,
    /// Of strangers.
    strangers: usize,
    /// Of strangers of one address.
    per_peer: usize,
}

#[derive(Debug)]
struct State {
    bounds: Bounds,
    /// Counts up, so that an older connection has a smaller number.
    next: u64,
    strangers: BTreeMap<u64, Stranger>,
    known: BTreeMap<u64, Known>,
    /// Strangers by address; none that is 0.
    by_peer: HashMap<IpAddr, usize>,
    /// How many strangers had to leave before they had a chance.
    hurried: u64,
    /// Who has been told to leave and has not left yet.
    leaving: Option<(u64, Displaced)>,
}

#[derive(Debug)]
struct Stranger {
    peer: IpAddr,
    since: Instant,
    told: Arc<Notify>,
}

#[derive(Debug)]
struct Known {
    /// When it became idle, on the scale of [`State::next`]; none while it is at work.
    idle_since: Option<u64>,
    told: Arc<Notify>,
}

/// Why a connection had to make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Displaced {
    /// There were too many connections.
    Crowded,
    /// There were too many strangers of its address.
    PerPeer,
}

/// One connection's place; free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    shared: Arc<Shared>,
    peer: IpAddr,
    /// Who is behind the peer, if that is a proxy.
    client: OnceLock<IpAddr>,
    number: u64,
    told: Arc<Notify>,
}

impl Places {
    /// `limit` connections, at least 1; of these half are for strangers, and `per_peer` for those of one address.
    pub fn new(limit: usize, per_peer: usize) -> Self {
        let state = State {
            bounds: Bounds::new(limit, per_peer),
            next: 0,
            strangers: BTreeMap::new(),
            known: BTreeMap::new(),
            by_peer: HashMap::new(),
            hurried: 0,
            leaving: None,
        };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), changed: Notify::new() }) }
    }

    /// As many as [`Places::new`] says, from now on. Where there are fewer, nobody has to leave until the next
    /// newcomer, who then waits until there is a place for him.
    pub fn resize(&self, limit: usize, per_peer: usize) {
        self.shared.state().bounds = Bounds::new(limit, per_peer);
        self.shared.changed.notify_one();
    }

    /// A place for a newcomer, whose address is in its canonical form, as soon as somebody has made room for him. One
    /// caller at a time.
    ///
    /// Of a proxy there may be any number: whose share its connections take is said later, see [`Place::is_for`].
    pub async fn admit(&self, peer: IpAddr, is_proxy: bool) -> Place {
        loop {
            let changed = self.shared.changed.notified();
            let before = self.shared.state().hurried;
            if let Some(place) = self.try_admit(peer, is_proxy) {
                return place;
            }
            let hurried = self.shared.state().hurried;
            changed.await;
            if hurried > before && hurried.is_multiple_of(BURST) {
                sleep(BREATH).await;
            }
        }
    }

    /// A place if there is one; else somebody is told to leave.
    fn try_admit(&self, address: IpAddr, is_proxy: bool) -> Option<Place> {
        let peer = network(address);
        let mut state = self.shared.state();
        let bounds = state.bounds;
        let of_peer = state.by_peer.get(&peer).copied().unwrap_or(0);
        if !is_proxy && of_peer >= bounds.per_peer {
            let victim = state.oldest_stranger_of(peer);
            state.displace(victim, Displaced::PerPeer);
            return None;
        }
        let strangers = state.strangers.len();
        if strangers >= bounds.strangers || strangers + state.known.len() >= bounds.all {
            let victim = state.crowding_stranger().or_else(|| state.idlest());
            state.displace(victim, Displaced::Crowded);
            return None;
        }
        let (number, told) = (state.tick(), Arc::new(Notify::new()));
        state.strangers.insert(number, Stranger { peer, since: Instant::now(), told: Arc::clone(&told) });
        *state.by_peer.entry(peer).or_default() += 1;
        drop(state);
        Some(Place { shared: Arc::clone(&self.shared), peer: address, client: OnceLock::new(), number, told })
    }

    /// Tells somebody to leave, because the system is short of descriptors, and waits until anybody has.
    pub async fn make_room(&self) {
        let changed = self.shared.changed.notified();
        {
            let mut state = self.shared.state();
            let victim = state.crowding_stranger().or_else(|| state.idlest());
            state.displace(victim, Displaced::Crowded);
        }
        changed.await;
    }

    /// Waits until every place is free.
    pub async fn all_left(&self) {
        loop {
            let changed = self.shared.changed.notified();
            {
                let state = self.shared.state();
                if state.strangers.is_empty() && state.known.is_empty() {
                    return;
                }
            }
            changed.await;
        }
    }

    /// How many connections there are, and how many of them have shown a valid token.
    pub fn taken(&self) -> (usize, usize) {
        let state = self.shared.state();
        (state.strangers.len() + state.known.len(), state.known.len())
    }
}

impl Place {
    /// The peer's address, as it was given, or that of the client behind it.
    pub fn peer(&self) -> IpAddr {
        *self.client.get().unwrap_or(&self.peer)
    }

    /// The peer is a proxy, and the connection is this client's. Where the client has too many, its oldest goes.
    pub fn is_for(&self, client: IpAddr) {
        let _ = self.client.set(client);
        let client = network(client);
        let mut state = self.shared.state();
        let Some(stranger) = state.strangers.get_mut(&self.number) else { return };
        let proxy = std::mem::replace(&mut stranger.peer, client);
        state.forget_stranger_of(proxy);
        let of_client = state.by_peer.entry(client).or_default();
        *of_client += 1;
        if *of_client > state.bounds.per_peer {
            let victim = state.oldest_stranger_of(client);
            state.displace(victim, Displaced::PerPeer);
        }
    }

    /// The connection has shown a valid token, and is at work.
    pub fn prove(&self) {
        let mut state = self.shared.state();
        if let Some(Stranger { peer, told, .. }) = state.strangers.remove(&self.number) {
            state.forget_stranger_of(peer);
            state.known.insert(self.number, Known { idle_since: None, told });
            self.stay(&mut state);
        }
    }

    /// The connection waits for its next request (or has got one). An idle one may have to make room for others.
    pub fn idle(&self, is_idle: bool) {
        let mut state = self.shared.state();
        let now = state.tick();
        if let Some(known) = state.known.get_mut(&self.number) {
            known.idle_since = is_idle.then_some(now);
            if is_idle {
                self.shared.changed.notify_one();
            } else {
                self.stay(&mut state);
            }
        }
    }

    /// Whether it has shown a valid token.
    pub fn is_known(&self) -> bool {
        self.shared.state().known.contains_key(&self.number)
    }

    /// Waits until the connection has to leave.
    pub async fn displaced(&self) -> Displaced {
        loop {
            self.told.notified().await;
            // It may have proved itself meanwhile.
            if let Some((number, why)) = self.shared.state().leaving
                && number == self.number
            {
                return why;
            }
        }
    }

    /// It does not leave after all: somebody else has to.
    fn stay(&self, state: &mut State) {
        if state.leaving.is_some_and(|(number, _)| number == self.number) {
            state.leaving = None;
        }
        self.shared.changed.notify_one();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(stranger) = state.strangers.remove(&self.number) {
            state.forget_stranger_of(stranger.peer);
        }
        state.known.remove(&self.number);
        self.stay(&mut state);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing below panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bounds {
    fn new(all: usize, per_peer: usize) -> Self {
        let all = all.max(1);
        Self { all, strangers: all - all / 2, per_peer: per_peer.max(1) }
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Tells a connection to leave, unless one is leaving already.
    fn displace(&mut self, number: Option<u64>, why: Displaced) {
        let Some(number) = number.filter(|_| self.leaving.is_none()) else { return };
        let (told, is_young) = match (self.strangers.get(&number), self.known.get(&number)) {
            (Some(stranger), _) => (&stranger.told, stranger.since.elapsed() < YOUNG),
            (None, Some(known)) => (&known.told, false),
            (None, None) => return,
        };
        told.notify_one();
        self.hurried += u64::from(is_young);
        self.leaving = Some((number, why));
    }

    fn oldest_stranger_of(&self, peer: IpAddr) -> Option<u64> {
        self.strangers.iter().find(|(_, stranger)| stranger.peer == peer).map(|(number, _)| *number)
    }

    /// The oldest stranger among the addresses that have the most.
    fn crowding_stranger(&self) -> Option<u64> {
        let most = self.by_peer.values().max()?;
        let crowds = |stranger: &Stranger| self.by_peer.get(&stranger.peer) == Some(most);
        self.strangers.iter().find(|(_, stranger)| crowds(stranger)).map(|(number, _)| *number)
    }

    /// The connection that has been idle longest.
    fn idlest(&self) -> Option<u64> {
        let idle = self.known.iter().filter_map(|(number, known)| Some((known.idle_since?, *number)));
        idle.min().map(|(_, number)| number)
    }

    fn forget_stranger_of(&mut self, peer: IpAddr) {
        if let Some(count) = self.by_peer.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                self.by_peer.remove(&peer);
            }
        }
    }
}

/// What counts as one address: IPv6 hosts have a whole /64 to choose from (RFC 6177).
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

    const SOON: Duration = Duration::from_millis(1);

    fn peer(number: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, number])
    }

    /// Lets a newcomer in, who displaces the connection `victim`.
    async fn displace(places: &Places, newcomer: IpAddr, from: &mut Vec<Place>, victim: usize) -> Displaced {
        let admission = places.admit(newcomer, false);
        tokio::pin!(admission);
        assert!(timeout(SOON, &mut admission).await.is_err(), "there was a place");
        let mut why = None;
        for (index, place) in from.iter().enumerate() {
            let told = timeout(SOON, place.displaced()).await.ok();
            assert_eq!(told.is_some(), index == victim, "{index}: {told:?}");
            why = why.or(told);
        }
        drop(from.remove(victim));
        from.push(admission.await);
        why.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_stranger_makes_room() {
        let places = Places::new(8, 100);
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(places.admit(peer(1), false).await);
        }
        // Half of the places are for strangers.
        assert_eq!(displace(&places, peer(1), &mut held, 0).await, Displaced::Crowded);
        assert_eq!(displace(&places, peer(2), &mut held, 0).await, Displaced::Crowded);
        // The last one is alone; the next oldest of the address that has the most goes.
        assert_eq!(displace(&places, peer(2), &mut held, 0).await, Displaced::Crowded);
        assert_eq!(places.taken(), (4, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_displaces_itself() {
        let places = Places::new(20, 3);
        let mut held = vec![places.admit(peer(2), false).await];
        for _ in 0..3 {
            held.push(places.admit(peer(1), false).await);
        }
        assert_eq!(displace(&places, peer(1), &mut held, 1).await, Displaced::PerPeer);
        // Those who have shown a token do not count.
        held.iter().for_each(Place::prove);
        for _ in 0..3 {
            held.push(places.admit(peer(1), false).await);
        }
        assert_eq!(displace(&places, peer(1), &mut held, 4).await, Displaced::PerPeer);
        assert_eq!(places.taken(), (7, 4));
        // The flood of one address does not displace others.
        for _ in 0..3 {
            held.push(places.admit(peer(3), false).await);
        }
        for number in 4..8 {
            held.push(places.admit(peer(number), false).await);
        }
        assert_eq!(displace(&places, peer(8), &mut held, 4).await, Displaced::Crowded);
    }

    #[tokio::test(start_paused = true)]
    async fn the_clients_of_a_proxy_have_their_own_shares() {
        let places = Places::new(100, 2);
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(
                timeout(SOON, places.admit(peer(1), true)).await.expect("of a proxy there may be more"),
            );
        }
        for (place, client) in held.iter().zip([7, 8, 7, 8]) {
            place.is_for(peer(client));
            assert_eq!(place.peer(), peer(client));
        }
        for place in &held {
            assert!(timeout(SOON, place.displaced()).await.is_err());
        }
        held.push(places.admit(peer(1), true).await);
        held[4].is_for(peer(7));
        assert_eq!(timeout(SOON, held[0].displaced()).await, Ok(Displaced::PerPeer));
        drop(held);
        assert!(places.shared.state().by_peer.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_shown_a_token_goes_only_when_idle() {
        let places = Places::new(4, 100);
        let mut held = Vec::new();
        for _ in 0..4 {
            let place = places.admit(peer(1), false).await;
            place.prove();
            held.push(place);
        }
        assert_eq!(places.taken(), (4, 4));
        assert!(timeout(SOON, places.admit(peer(1), false)).await.is_err(), "all are at work");
        held[2].idle(true);
        held[1].idle(true);
        assert_eq!(displace(&places, peer(1), &mut held, 2).await, Displaced::Crowded);
        // A stranger goes before any of them.
        held[0].idle(true);
        assert!(timeout(SOON, places.admit(peer(1), false)).await.is_err());
        assert!(timeout(SOON, held[3].displaced()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_shows_a_token_just_in_time_stays() {
        let places = Places::new(4, 100);
        let (first, second) = (places.admit(peer(1), false).await, places.admit(peer(1), false).await);
        let admission = places.admit(peer(1), false);
        tokio::pin!(admission);
        assert!(timeout(SOON, &mut admission).await.is_err());
        first.prove();
        let third = admission.await;
        assert!(timeout(SOON, first.displaced()).await.is_err());
        assert!(timeout(SOON, second.displaced()).await.is_err());
        assert_eq!(places.taken(), (3, 1));
        drop((first, second));
        assert!(timeout(SOON, places.all_left()).await.is_err());
        drop(third);
        places.all_left().await;
        assert!(places.shared.state().by_peer.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn who_gets_his_next_request_just_in_time_stays() {
        let places = Places::new(1, 1);
        let only = places.admit(peer(1), false).await;
        only.prove();
        only.idle(true);
        assert!(timeout(SOON, places.admit(peer(2), false)).await.is_err());
        only.idle(false);
        assert!(timeout(SOON, only.displaced()).await.is_err());
        only.idle(true);
        assert!(timeout(SOON, places.admit(peer(2), false)).await.is_err());
        assert_eq!(timeout(SOON, only.displaced()).await, Ok(Displaced::Crowded));
    }

    #[tokio::test(start_paused = true)]
    async fn one_place_is_enough() {
        let places = Places::new(1, 1);
        let mut held = vec![places.admit(peer(1), false).await];
        assert_eq!(displace(&places, peer(2), &mut held, 0).await, Displaced::Crowded);
        held[0].prove();
        assert!(timeout(SOON, places.admit(peer(1), false)).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn places_can_become_more_and_fewer() {
        let places = Places::new(4, 100);
        let mut held = vec![places.admit(peer(1), false).await, places.admit(peer(1), false).await];
        let admission = places.admit(peer(2), false);
        tokio::pin!(admission);
        assert!(timeout(SOON, &mut admission).await.is_err());
        places.resize(8, 100);
        held.push(timeout(SOON, admission).await.expect("a place for who waits"));
        // Who was told to leave then is gone before anybody else is told.
        assert!(timeout(SOON, held[0].displaced()).await.is_ok());
        drop(held.remove(0));
        held.push(places.admit(peer(2), false).await);

        // Three are there, and one stranger may be: nobody goes before a newcomer comes, then as many as have to.
        places.resize(2, 100);
        for place in &held {
            assert!(timeout(SOON, place.displaced()).await.is_err());
        }
        let admission = places.admit(peer(3), false);
        tokio::pin!(admission);
        while !held.is_empty() {
            assert!(timeout(SOON, &mut admission).await.is_err(), "{} are there", held.len());
            let mut told = Vec::new();
            for place in &held {
                told.push(timeout(SOON, place.displaced()).await.is_ok());
            }
            let leaving = told.iter().position(|told| *told).expect("somebody has to leave");
            drop(held.remove(leaving));
        }
        timeout(SOON, admission).await.unwrap();

        // One address's share, too.
        places.resize(100, 2);
        let _held = [places.admit(peer(1), false).await, places.admit(peer(1), false).await];
        assert!(timeout(SOON, places.admit(peer(1), false)).await.is_err());
        places.resize(100, 3);
        assert!(timeout(SOON, places.admit(peer(1), false)).await.is_ok());
    }

    #[test]
    fn an_address_is_a_network() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"));
        assert!(!same("2001:db8:1:2::1", "2001:db8:1:3::1"));
        assert!(!same("192.0.2.1", "192.0.2.2"));
    }
}
