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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// All places. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Places {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Of all connections.
    limit: usize,
    /// Of strangers.
    strangers: usize,
    /// Of strangers of one address.
    per_peer: usize,
    state: Mutex<State>,
    /// Something changed that a newcomer or the drain may wait for.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Counts up, so that an older connection has a smaller number.
    next: u64,
    strangers: BTreeMap<u64, Stranger>,
    known: BTreeMap<u64, Known>,
    /// Strangers by address; none that is 0.
    by_peer: HashMap<IpAddr, usize>,
    /// Who has been told to leave and has not left yet.
    leaving: Option<(u64, Displaced)>,
}

#[derive(Debug)]
struct Stranger {
    peer: IpAddr,
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
    number: u64,
    told: Arc<Notify>,
}

impl Places {
    /// `limit` connections, at least 1; of these half are for strangers, and `per_peer` for those of one address.
    pub fn new(limit: usize, per_peer: usize) -> Self {
        let limit = limit.max(1);
        let shared = Shared {
            limit,
            strangers: limit - limit / 2,
            per_peer: per_peer.max(1),
            state: Mutex::default(),
            changed: Notify::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A place for a newcomer, as soon as somebody has made room for him. One caller at a time.
    pub async fn admit(&self, peer: IpAddr) -> Place {
        let peer = network(peer);
        loop {
            let changed = self.shared.changed.notified();
            if let Some(place) = self.try_admit(peer) {
                return place;
            }
            changed.await;
        }
    }

    /// A place if there is one; else somebody is told to leave.
    fn try_admit(&self, peer: IpAddr) -> Option<Place> {
        let Shared { limit, strangers, per_peer, .. } = *self.shared;
        let mut state = self.shared.state();
        let of_peer = state.by_peer.get(&peer).copied().unwrap_or(0);
        if of_peer >= per_peer {
            let victim = state.oldest_stranger_of(peer);
            state.displace(victim, Displaced::PerPeer);
            return None;
        }
        if state.strangers.len() >= strangers || state.strangers.len() + state.known.len() >= limit {
            let victim = state.crowding_stranger().or_else(|| state.idlest());
            state.displace(victim, Displaced::Crowded);
            return None;
        }
        let (number, told) = (state.tick(), Arc::new(Notify::new()));
        state.strangers.insert(number, Stranger { peer, told: Arc::clone(&told) });
        *state.by_peer.entry(peer).or_default() += 1;
        drop(state);
        Some(Place { shared: Arc::clone(&self.shared), number, told })
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
    /// The connection has shown a valid token, and is at work.
    pub fn prove(&self) {
        let mut state = self.shared.state();
        if let Some(Stranger { peer, told }) = state.strangers.remove(&self.number) {
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

impl State {
    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Tells a connection to leave, unless one is leaving already.
    fn displace(&mut self, number: Option<u64>, why: Displaced) {
        let Some(number) = number.filter(|_| self.leaving.is_none()) else { return };
        let told = match (self.strangers.get(&number), self.known.get(&number)) {
            (Some(stranger), _) => &stranger.told,
            (None, Some(known)) => &known.told,
            (None, None) => return,
        };
        told.notify_one();
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
    match peer.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    fn peer(number: u8) -> IpAddr {
        IpAddr::from([127, 0, 0, number])
    }

    /// Lets a newcomer in, who displaces the connection `victim`.
    async fn displace(places: &Places, newcomer: IpAddr, from: &mut Vec<Place>, victim: usize) -> Displaced {
        let admission = places.admit(newcomer);
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
            held.push(places.admit(peer(1)).await);
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
        let mut held = vec![places.admit(peer(2)).await];
        for _ in 0..3 {
            held.push(places.admit(peer(1)).await);
        }
        assert_eq!(displace(&places, peer(1), &mut held, 1).await, Displaced::PerPeer);
        // Those who have shown a token do not count.
        held.iter().for_each(Place::prove);
        for _ in 0..3 {
            held.push(places.admit(peer(1)).await);
        }
        assert_eq!(displace(&places, peer(1), &mut held, 4).await, Displaced::PerPeer);
        assert_eq!(places.taken(), (7, 4));
        // The flood of one address does not displace others.
        for _ in 0..3 {
            held.push(places.admit(peer(3)).await);
        }
        for number in 4..8 {
            held.push(places.admit(peer(number)).await);
        }
        assert_eq!(displace(&places, peer(8), &mut held, 4).await, Displaced::Crowded);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_shown_a_token_goes_only_when_idle() {
        let places = Places::new(4, 100);
        let mut held = Vec::new();
        for _ in 0..4 {
            let place = places.admit(peer(1)).await;
            place.prove();
            held.push(place);
        }
        assert_eq!(places.taken(), (4, 4));
        assert!(timeout(SOON, places.admit(peer(1))).await.is_err(), "all are at work");
        held[2].idle(true);
        held[1].idle(true);
        assert_eq!(displace(&places, peer(1), &mut held, 2).await, Displaced::Crowded);
        // A stranger goes before any of them.
        held[0].idle(true);
        assert!(timeout(SOON, places.admit(peer(1))).await.is_err());
        assert!(timeout(SOON, held[3].displaced()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_shows_a_token_just_in_time_stays() {
        let places = Places::new(4, 100);
        let (first, second) = (places.admit(peer(1)).await, places.admit(peer(1)).await);
        let admission = places.admit(peer(1));
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
        let only = places.admit(peer(1)).await;
        only.prove();
        only.idle(true);
        assert!(timeout(SOON, places.admit(peer(2))).await.is_err());
        only.idle(false);
        assert!(timeout(SOON, only.displaced()).await.is_err());
        only.idle(true);
        assert!(timeout(SOON, places.admit(peer(2))).await.is_err());
        assert_eq!(timeout(SOON, only.displaced()).await, Ok(Displaced::Crowded));
    }

    #[tokio::test(start_paused = true)]
    async fn one_place_is_enough() {
        let places = Places::new(1, 1);
        let mut held = vec![places.admit(peer(1)).await];
        assert_eq!(displace(&places, peer(2), &mut held, 0).await, Displaced::Crowded);
        held[0].prove();
        assert!(timeout(SOON, places.admit(peer(1))).await.is_err());
    }

    #[test]
    fn an_address_is_a_network() {
        let same = |a: &str, b: &str| network(a.parse().unwrap()) == network(b.parse().unwrap());
        assert!(same("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"));
        assert!(!same("2001:db8:1:2::1", "2001:db8:1:3::1"));
        assert!(same("::ffff:192.0.2.1", "192.0.2.1"));
        assert!(!same("192.0.2.1", "192.0.2.2"));
    }
}
