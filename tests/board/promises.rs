//! Exactly once on the board: through rebalances, kills, lost servers and topics made anew.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use falaj::consume::batch::Batch;
use falaj::consume::event::parse;
use falaj::consume::redis::{Applied, Call, Store};
use falaj::mock_external::{Mock, serve};
use tokio_util::sync::CancellationToken;

use super::model::Load;
use super::servers::OwnRedis;
use super::*;

#[test]
fn the_board_equals_an_independent_count_and_aborted_transactions_are_unseen() {
    let (mut rig, mut load) = (Rig::new("count"), Load::new(1));
    for _ in 0..10 {
        rig.write(&load.events(300));
        rig.abort(&load.events(50));
    }
    rig.consume_until_end();
    rig.assert_board();
    assert!(rig.board()["top"].as_array().unwrap().len() > 10);
    // A second run finds everything applied, and adds what is new.
    rig.write(&load.events(100));
    rig.consume_until_end();
    rig.assert_board();
}

#[test]
fn until_end_means_the_last_stable_offset() {
    let (mut rig, mut load) = (Rig::new("stable"), Load::new(2));
    rig.write(&load.events(100));
    let open = load.events(100);
    rig.transaction(&open);
    rig.consume_until_end();
    rig.assert_board();
    rig.producer().commit_transaction(DEADLINE).unwrap();
    rig.written.extend(open);
    rig.consume_until_end();
    rig.assert_board();
}

#[test]
fn an_empty_topic_ends_at_once_and_an_empty_redis_gives_empty_lists() {
    let rig = Rig::new("empty");
    rig.assert_board();
    rig.consume_until_end();
    rig.assert_board();
    let table = rig.command(&["board"]).output().unwrap();
    assert_eq!(table.status.code(), Some(0));
}

#[test]
fn instances_come_and_go_under_load_and_the_count_is_exact() {
    let (mut rig, mut load) = (Rig::new("rebalance"), Load::new(3));
    let mut first = Some(rig.consume());
    let mut others = Vec::new();
    for round in 0..60 {
        rig.write(&load.events(200));
        match round {
            10 => {
                eventually("the first instance reads", || rig.stored() > 0);
                others.push(rig.consume());
            }
            30 => assert_eq!(first.take().unwrap().terminate(), Some(0)),
            40 => others.push(rig.consume()),
            _ => {}
        }
    }
    // With more instances than partitions, one ends on what the others apply.
    others.push(rig.consume());
    rig.consume_until_end();
    rig.assert_board();
    for running in others {
        assert_eq!(running.terminate(), Some(0));
    }
    rig.assert_board();
}

/// Two instances of five have no partition: they must follow the group as the others do, or nobody takes over.
#[test]
fn an_instance_without_a_partition_takes_over() {
    let (mut rig, mut load) = (Rig::new("spare"), Load::new(10));
    rig.write(&load.events(200));
    let mut running: Vec<Running> = (0..5).map(|_| rig.consume()).collect();
    let last = running.pop().unwrap();
    eventually("all are in the group", || rig.members() == Some(5));
    running.pop().unwrap().kill();
    eventually("the group goes on without the one that died", || rig.members() == Some(4));
    running.into_iter().for_each(Running::kill);
    rig.write(&load.events(200));
    eventually("the last one has taken over", || rig.board_is_right());
    assert_eq!(last.terminate(), Some(0));
}

#[test]
fn sigkill_at_random_moments_loses_and_doubles_nothing() {
    let seed = u64::from(std::process::id());
    let (mut rig, mut load) = (Rig::new("sigkill"), Load::new(seed));
    for _ in 0..15 {
        rig.write(&load.events(2000));
    }
    for kill in 0..6 {
        let (running, before) = (rig.consume(), rig.stored());
        rig.write(&load.events(3000));
        // It dies wherever it happens to be after its first batches.
        eventually("it reads", || rig.stored() > before + 17 * kill);
        running.kill();
    }
    rig.consume_until_end();
    rig.assert_board();
}

#[test]
fn a_batch_is_applied_once_and_only_on_what_it_builds_on() {
    let mut rig = Rig::new("compare_and_set");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (store, event) = (Store::new(&rig.config).unwrap(), Ev::now(1));
    let json = event.json();
    let mut batch = Batch::default();
    batch.add(&parse(json.as_bytes()).unwrap().unwrap());
    let claim = runtime.block_on(store.claim("topic-1", None)).unwrap();
    let apply = |generation: &str, from, next| {
        let call = Call { generation, partition: 0, from, next, batch: &batch };
        runtime.block_on(store.apply(&call)).unwrap()
    };
    let generation = claim.generation.as_str();
    assert_eq!(apply(generation, Some(3), 9), Applied::Elsewhere, "nothing is stored yet");
    assert_eq!(apply(generation, None, 1), Applied::Yes);
    assert_eq!(apply(generation, None, 1), Applied::Yes, "the answer was lost, the call comes again");
    assert_eq!(apply(generation, None, 7), Applied::Elsewhere, "another instance was first");
    assert_eq!(apply("before", Some(1), 2), Applied::Elsewhere, "a generation that was given up");
    rig.written.push(event);
    rig.assert_board();
    let other = runtime.block_on(store.claim("topic-2", None)).unwrap();
    assert_eq!((other.replaced.as_deref(), other.offsets.len()), (Some("topic-1"), 0));
    assert_ne!(other.generation, claim.generation);
    rig.written.clear();
    rig.assert_board();
}

#[test]
fn a_flushed_redis_is_rebuilt_without_a_new_record() {
    let url = std::env::var("FALAJ_REDIS__URL").expect("FALAJ_REDIS__URL is unset: eval \"$(dev/stack env)\" first");
    let url = format!("{}/9", url.rsplit_once('/').unwrap().0);
    let (mut rig, mut load) = (Rig::with_redis("flush", &url), Load::new(4));
    rig.write(&load.events(1000));
    let running = rig.consume();
    eventually("the board is right", || rig.board_is_right());
    let mut redis = redis::Client::open(url).unwrap().get_connection().unwrap();
    redis::cmd("FLUSHDB").exec(&mut redis).unwrap();
    eventually("the board is rebuilt", || rig.board_is_right());
    assert_eq!(running.terminate(), Some(0));
}

#[test]
fn a_topic_made_anew_begins_a_new_board() {
    let (mut rig, mut load) = (Rig::new("anew"), Load::new(5));
    rig.write(&load.events(500));
    rig.consume_until_end();
    rig.assert_board();
    eventually("status says that nothing is left", || rig.status()["board"]["lag_records"] == 0);
    rig.make_topic_anew(3);
    rig.write(&load.events(700));
    let another = "the board is of another topic: consume rebuilds it";
    eventually("status says that the board is another topic's", || rig.status()["board"]["error"] == another);
    rig.consume_until_end();
    rig.assert_board();
    eventually("status says that nothing is left", || rig.status()["board"]["lag_records"] == 0);
}

#[test]
fn a_topic_made_anew_with_fewer_partitions_is_read_without_a_restart() {
    let (mut rig, mut load) = (Rig::new("fewer"), Load::new(11));
    rig.write(&load.events(500));
    let running = rig.consume();
    eventually("the board is right", || rig.board_is_right());
    rig.make_topic_anew(1);
    rig.write(&load.events(700));
    eventually("the board is that of the new topic", || rig.board_is_right());
    assert_eq!(running.terminate(), Some(0));
}

#[test]
fn a_full_or_restarted_redis_is_waited_for_and_nothing_is_lost() {
    let mut redis = OwnRedis::start(&["--maxmemory", "1"]);
    let (mut rig, mut load) = (Rig::with_redis("full", &redis.url()), Load::new(6));
    rig.write(&load.events(500));
    let mut command = rig.command(&["consume", "--sinks", "redis"]);
    let log = redis.dir.path().join("falaj.log");
    command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
    let running = Running(command.spawn().unwrap());
    eventually("it says that the memory is full", || std::fs::read_to_string(&log).unwrap().contains("memory is full"));
    redis.config_set("maxmemory", "0");
    eventually("the board is right", || rig.board_is_right());
    redis = redis.restart();
    rig.write(&load.events(500));
    eventually("the board is right after a restart of Redis", || rig.board_is_right());
    assert_eq!(running.terminate(), Some(0));
    drop(redis.running);
}

#[test]
fn a_redis_that_hangs_does_not_hold_a_shutdown_back() {
    let redis = OwnRedis::start(&[]);
    let (mut rig, mut load) = (Rig::with_redis("hangs", &redis.url()), Load::new(9));
    rig.write(&load.events(100));
    let running = rig.consume();
    let follower = Running(rig.command(&["board", "--follow", "--json"]).stdout(Stdio::null()).spawn().unwrap());
    eventually("the board is right", || rig.board_is_right());
    redis.running.signal("STOP");
    rig.write(&load.events(100));
    assert_eq!((running.terminate(), follower.terminate()), (Some(0), Some(0)));
    redis.running.signal("CONT");
    rig.consume_until_end();
    rig.assert_board();
}

#[test]
fn a_followed_board_ends_with_its_reader() {
    let (mut rig, mut load) = (Rig::new("reader"), Load::new(3));
    rig.write(&load.events(10));
    rig.consume_until_end();
    let mut follower = rig.command(&["board", "--follow", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(follower.stdout.take().unwrap());
    assert!(out.read_line(&mut String::new()).unwrap() > 0);
    drop(out);
    eventually("it ends", || follower.try_wait().unwrap().is_some());
    assert_eq!(follower.wait().unwrap().code(), Some(0));
}

#[test]
fn an_evicting_redis_is_refused_with_78() {
    let redis = OwnRedis::start(&["--maxmemory-policy", "allkeys-lru"]);
    let rig = Rig::with_redis("evicting", &redis.url());
    for verb in [&["consume", "--sinks", "redis"][..], &["board"]] {
        let out = rig.command(verb).output().unwrap();
        assert_eq!(out.status.code(), Some(78), "{}", stderr(&out));
        assert!(stderr(&out).contains("CONFIG SET maxmemory-policy noeviction"), "{}", stderr(&out));
    }
}

#[test]
fn a_topic_that_is_not_there_is_refused_with_78() {
    let mut rig = Rig::new("missing");
    rig.env.retain(|(k, _)| k != "FALAJ_PIPELINE");
    rig.env.push(("FALAJ_PIPELINE".into(), "board_never_made".into()));
    let out = rig.command(&["consume", "--sinks", "redis"]).output().unwrap();
    assert_eq!(out.status.code(), Some(78), "{}", stderr(&out));
    assert!(stderr(&out).contains("falaj init"), "{}", stderr(&out));
}

#[test]
fn without_sinks_both_outlets_are_fed() {
    let (mut rig, mut load) = (Rig::new("both"), Load::new(8));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let letters = rig.config.dead_letter_topic();
    runtime.block_on(falaj::kafka::create_topic(&rig.config.kafka, &letters, 1, &[])).unwrap();
    let peer = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    rig.env.push(("FALAJ_EXTERNAL__URL".into(), format!("http://{}/events", peer.local_addr().unwrap())));
    let mock = Mock::default();
    runtime.spawn(serve(peer, mock.clone(), CancellationToken::new()));
    rig.write(&load.events(300));
    let out = rig.command(&["consume", "--until-end"]).output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    rig.assert_board();
    let sent = rig.written.iter().filter(|e| e.op != "r").count() as u64;
    let counts = mock.received().counts();
    assert_eq!((counts.unique, counts.requests), (sent, sent));
}

#[test]
fn an_outlet_with_an_empty_address_is_left_out_and_one_at_least_is_needed() {
    let (mut rig, mut load) = (Rig::new("no_external"), Load::new(12));
    rig.env.push(("FALAJ_EXTERNAL__URL".into(), String::new()));
    rig.write(&load.events(100));
    let out = rig.command(&["consume", "--until-end"]).output().unwrap();
    assert_eq!(out.status.code(), Some(0), "{}", stderr(&out));
    rig.assert_board();
    let out = rig.command(&["consume", "--until-end"]).env("FALAJ_REDIS__URL", "").output().unwrap();
    assert_eq!(out.status.code(), Some(78), "{}", stderr(&out));
    assert!(stderr(&out).contains("consume_outlets"), "{}", stderr(&out));
}

#[test]
fn without_a_terminal_a_report_is_one_json_line() {
    let (mut rig, mut load) = (Rig::new("report"), Load::new(7));
    rig.write(&load.events(100));
    let out = rig.command(&["consume", "--sinks", "redis", "--until-end"]).output().unwrap();
    let line = String::from_utf8(out.stdout).unwrap();
    let report: Value = serde_json::from_str(line.lines().last().unwrap()).unwrap();
    let created = rig.written.iter().filter(|e| e.op == "c").count();
    assert_eq!(report["events"], created);
    assert_eq!(report["malformed"], 0);
    assert!(report["latency_ms"]["p50"].as_f64().unwrap() > 0.0);
    assert_eq!(report["board"]["window_seconds"], 600);
    assert!(Duration::from_millis(report["latency_ms"]["max"].as_f64().unwrap() as u64) < DEADLINE);
}
