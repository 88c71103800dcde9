//! What an operator sees of the board's reader when something is wrong: `/readyz`, `/metrics`, the log.

use super::model::Load;
use super::servers::{OwnRedis, Served};
use super::*;

#[test]
fn a_topic_of_foreign_records_is_not_ready_until_events_come_again() {
    let mut rig = Rig::new("foreign_topic");
    rig.write(&[Ev::now(1)]);
    let served = Served::start(&rig);
    eventually("the board is right", || rig.board_is_right());
    eventually("it is ready", || served.is_ready());
    rig.write_values(&[r#"{"_op":"c"}"#, "not json", r#"{"_op":"c"}"#]);
    eventually("the check fails", || served.failing("board_events").is_some());
    let why = served.failing("board_events").unwrap();
    assert!(why.contains(&rig.topic()) && why.contains("_id is missing or null") && why.contains("offset"), "{why}");
    assert!(!served.is_ready());
    rig.write(&[Ev::now(2)]);
    eventually("it is ready again", || served.is_ready());
    rig.assert_board();
    let log = served.log();
    assert_eq!(log.lines().filter(|line| line.contains("no engagement event")).count(), 1, "{log}");
    assert_eq!(served.running.terminate(), Some(0));
}

/// A member that does not come to a rebalance holds it up, and all others have nothing to read meanwhile.
#[test]
fn a_reader_that_the_group_gives_nothing_is_not_ready() {
    let mut rig = Rig::new("nothing");
    rig.write(&[Ev::now(1)]);
    let mut client = falaj::kafka::client(&rig.config.kafka);
    client.set("group.id", format!("{}.redis", rig.config.pipeline)).set("partition.assignment.strategy", "range");
    let other: BaseConsumer = client.create().unwrap();
    other.subscribe(&[&rig.topic()]).unwrap();
    eventually("the other member has all partitions", || {
        let _ = other.poll(Duration::from_millis(100));
        other.assignment().unwrap().count() == 3
    });
    let served = Served::start(&rig);
    eventually("it is not ready", || served.failing("kafka_board").is_some_and(|why| why.contains("nothing yet")));
    drop(other);
    eventually("it is ready", || served.is_ready());
    eventually("the board is right", || rig.board_is_right());
    assert_eq!(served.running.terminate(), Some(0));
}

#[test]
fn a_reader_that_redis_holds_up_shows_its_lag_and_leaves_the_group_until_it_is_back() {
    let redis = OwnRedis::start(&[]);
    let (mut rig, mut load) = (Rig::with_redis("held_up", &redis.url()), Load::new(13));
    rig.env.push(("FALAJ_KAFKA__MAX_POLL_INTERVAL_MS".into(), "7000".into()));
    rig.write(&load.events(100));
    let served = Served::start(&rig);
    eventually("the board is right", || rig.board_is_right());
    eventually("it is in the group", || rig.members() == Some(1));
    redis.running.signal("STOP");
    rig.write(&load.events(100));
    eventually("it shows what it has not applied", || served.lag() >= 100.0);
    eventually("the group goes on without it", || rig.members() != Some(1));
    redis.running.signal("CONT");
    eventually("it is in the group again", || rig.members() == Some(1));
    eventually("the board is right again", || rig.board_is_right());
    eventually("nothing is left", || served.lag() == 0.0);
    assert_eq!(served.running.terminate(), Some(0));
}
