use std::sync::atomic::AtomicUsize;

use super::*;
use crate::timeline::tests::arrival;

#[derive(Debug, Default, Clone)]
struct Count(Arc<AtomicUsize>);

impl Watch for Count {
    fn first_token(&self, _: &PlacementTimes, _: Millis) {}

    fn ended(&self, timeline: &Arc<Timeline>) {
        assert!(timeline.ended.is_some());
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn requests(kept_max: usize) -> (Requests, Count) {
    let count = Count::default();
    (Requests::new(kept_max, Box::new(count.clone())), count)
}

fn ids(snapshots: &[Snapshot]) -> Vec<u128> {
    snapshots
        .iter()
        .map(|snapshot| snapshot.timeline.arrival.request.0)
        .collect()
}

#[test]
fn what_runs_is_listed_until_it_ends_and_then_kept() {
    let (requests, count) = requests(2);
    let tracks: Vec<Track> = (1..=4)
        .map(|id| requests.arrived(arrival(id), Instant::now()))
        .collect();
    let (running, ended) = requests.newest(10, 10);
    assert_eq!((ids(&running), ids(&ended)), (vec![4, 3, 2, 1], vec![]));
    tracks[0].end(Ending::Finished, "");
    tracks[0].end(Ending::Cancelled, "");
    assert_eq!(count.0.load(Ordering::Relaxed), 1);
    drop(tracks);
    let (running, ended) = requests.newest(10, 10);
    assert_eq!((ids(&running), ids(&ended)), (vec![], vec![4, 3]));
    assert_eq!(count.0.load(Ordering::Relaxed), 4);
    assert_eq!(
        ended[0].timeline.ended.map(|(_, ending)| ending),
        Some(Ending::Cancelled)
    );
}

#[test]
fn a_router_may_keep_none() {
    let (requests, _) = requests(0);
    drop(requests.arrived(arrival(1), Instant::now()));
    assert!(requests.of_id(RequestId(1)).is_empty());
}

#[test]
fn cancelling_reaches_every_request_of_that_name_that_runs() {
    let (requests, _) = requests(8);
    let tracks: Vec<Track> = [1, 1, 2, 1]
        .into_iter()
        .map(|id| requests.arrived(arrival(id), Instant::now()))
        .collect();
    tracks[3].end(Ending::Finished, "");
    assert_eq!(requests.cancel(RequestId(1)), 2);
    assert_eq!(requests.cancel(RequestId(3)), 0);
    let cancelled: Vec<bool> = tracks
        .iter()
        .map(|track| track.cancelled().is_cancelled())
        .collect();
    assert_eq!(cancelled, [true, true, false, false]);
    assert_eq!(requests.of_id(RequestId(1)).len(), 3);
}
