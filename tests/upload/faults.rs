//! Scripted faults on the way to the server, and kills.

use std::process::Stdio;
use std::time::{Duration, Instant};

use axum::http::Method;
use rand::{Rng, SeedableRng};

use super::bench::{Bench, Guard, ids, row, rows, text, until};
use super::proxy::{Fault, Proxy};

const POST: Method = Method::POST;
const PUT: Method = Method::PUT;
const GET: Method = Method::GET;
const UPLOAD: &str = "/upload/bigquery/v2/projects/local/jobs?uploadType=resumable";
const JOB: &str = "/projects/local/jobs/falaj-";

const ABSENT: &str = r#"{"error":{"code":404,"message":"Not found: Job","errors":[]}}"#;

/// A test's world with a proxy before the server.
fn behind_proxy(name: &str) -> (Bench, Proxy) {
    let mut bench = Bench::new(name);
    let proxy = Proxy::before(&bench.endpoint);
    bench.endpoint.clone_from(&proxy.endpoint);
    (bench, proxy)
}

/// Two batches meet a fault on their way and are loaded once all the same.
fn survives(name: &str, method: Method, part: &'static str, times: usize, fault: Fault) -> (Bench, Proxy) {
    let (bench, proxy) = behind_proxy(name);
    bench.seal(&[("events", &rows(0, 10))]);
    bench.seal(&[("events", &rows(10, 20))]);
    proxy.script(method, part, times, fault);
    assert_eq!(bench.loads(), bench.line(1, 20));
    assert!(proxy.is_played());
    assert_eq!(bench.ids("events"), ids(&rows(0, 20)));
    assert_eq!(bench.loaded(), 1);
    (bench, proxy)
}

#[test]
fn the_answer_to_the_file_is_lost() {
    let (bench, _) = survives("lost_put", PUT, UPLOAD, 1, Fault::LoseAnswer);
    assert_eq!(bench.jobs().len(), 1);
}

#[test]
fn the_answer_to_the_beginning_is_lost() {
    survives("lost_post", POST, UPLOAD, 1, Fault::LoseAnswer);
}

#[test]
fn the_service_is_away_or_over_its_quota_for_a_while() {
    let away = Fault::Answer(503, "<html>upstream connect error</html>");
    survives("away_post", POST, UPLOAD, 2, away.clone());
    survives("away_put", PUT, UPLOAD, 2, away.clone());
    survives("away_get", GET, "/tables/events", 2, away.clone());
    survives("away_dataset", POST, "/datasets", 1, away);
    let quota = r#"{"error":{"code":403,"message":"too many","errors":[{"reason":"rateLimitExceeded"}]}}"#;
    survives("quota", POST, UPLOAD, 2, Fault::Answer(403, quota));
    survives("busy", PUT, UPLOAD, 1, Fault::Answer(429, ""));
}

#[test]
fn a_file_of_several_chunks_goes_on_where_the_service_says() {
    let (bench, proxy) = behind_proxy("chunks");
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    let mut big = rows(0, 20_000);
    for row in &mut big {
        row.title = Some((0..64).map(|_| format!("{:08x}", random.random::<u32>())).collect());
    }
    let batch = bench.seal(&[("events", &big)]);
    let chunks = std::fs::metadata(batch.join("events.parquet")).unwrap().len().div_ceil(4 << 20) as usize;
    assert_eq!(chunks, 3);
    proxy.script(PUT, UPLOAD, 1, Fault::Pass);
    proxy.script(PUT, UPLOAD, 1, Fault::LoseAnswer);
    assert_eq!(bench.loads(), bench.line(1, 20_000));
    assert_eq!(proxy.count(&PUT, UPLOAD), chunks + 1);
    assert_eq!(bench.ids("events"), ids(&big));
}

#[test]
fn the_service_has_every_byte_and_names_no_job_yet() {
    let (bench, proxy) = survives("every_byte", PUT, UPLOAD, 1, Fault::HasEveryByte);
    assert_eq!(bench.jobs().len(), 1);
    // The bytes once, and then a question, not an empty range.
    assert_eq!((proxy.count(&PUT, UPLOAD), proxy.count(&PUT, " bytes */")), (2, 1));
}

#[test]
fn the_upload_is_forgotten_by_the_service() {
    let (_, proxy) = survives("forgotten", PUT, UPLOAD, 1, Fault::Answer(404, "Not Found"));
    assert_eq!(proxy.count(&POST, UPLOAD), 2);
}

#[test]
fn a_job_that_runs_is_waited_for() {
    let (bench, proxy) = behind_proxy("running");
    bench.seal(&[("events", &rows(0, 10))]);
    // Looked for before the table is made, and before the job is sent.
    proxy.script(GET, JOB, 2, Fault::Answer(404, ABSENT));
    proxy.script(PUT, UPLOAD, 1, Fault::StillRunning);
    proxy.script(GET, JOB, 2, Fault::StillRunning);
    assert_eq!(bench.loads(), bench.line(1, 10));
    assert!(proxy.is_played());
    assert_eq!(bench.ids("events"), ids(&rows(0, 10)));
    assert_eq!(bench.loaded(), 1);
}

#[test]
fn a_job_that_never_ends_holds_up_its_own_table_alone() {
    let (bench, proxy) = behind_proxy("endless");
    bench.seal(&[("a", &rows(0, 2)), ("b", &rows(0, 2))]);
    proxy.script(PUT, UPLOAD, 2, Fault::StillRunning);
    proxy.script(GET, "/projects/local/jobs/falaj-test-a-start", usize::MAX, Fault::StillRunning);
    let mut command = bench.upload(&[]);
    let command = command.env("FALAJ_BIGQUERY__LOAD_EVERY", "1s").stdout(Stdio::null());
    let _process = Guard(command.spawn().unwrap());
    until("each table has its job", || bench.loaded() == 2);
    bench.seal(&[("a", &rows(2, 4)), ("b", &rows(2, 4))]);
    until("the other table goes on", || bench.loaded() == 3);
    assert_eq!((bench.ids("a"), bench.ids("b")), (ids(&rows(0, 2)), ids(&rows(0, 4))));
}

#[test]
fn a_failed_job_has_loaded_nothing_and_the_next_generation_loads() {
    let (bench, _) = survives("failed", PUT, UPLOAD, 1, Fault::Garble);
    let jobs = bench.jobs();
    let (first, second) = (&jobs[0], &jobs[1]);
    assert_eq!((first.1, second.1, jobs.len()), ("failed", "ok", 2));
    assert_eq!(second.0, format!("{}-g1", first.0));
}

#[test]
fn an_answer_that_is_whole_and_unknown_is_told_and_other_tables_go_on() {
    const RANGE: &str = r#"{"tableReference":{"projectId":"local","datasetId":"d","tableId":"events"},
        "schema":{"fields":[{"name":"during","type":"RANGE"}]}}"#;
    let (bench, proxy) = behind_proxy("unknown");
    bench.seal(&[("events", &rows(0, 10)), ("other", &rows(0, 3))]);
    proxy.script(GET, "/tables/events", 1, Fault::Answer(200, RANGE));
    let output = bench.once();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        text(&output).contains("looking up table events: HTTP 200 OK, but unknown variant `RANGE`"),
        "{}",
        text(&output)
    );
    assert_eq!(bench.ids("other"), ids(&rows(0, 3)));
    assert_eq!(bench.loads(), bench.line(1, 10));
}

#[test]
fn a_job_that_always_fails_is_told_and_starts_at_the_next_generation_later() {
    let (bench, proxy) = behind_proxy("fails");
    bench.seal(&[("events", &rows(0, 10))]);
    proxy.script(PUT, UPLOAD, 3, Fault::Garble);
    let output = bench.once();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("loading test-events: job falaj-test-events-start-"), "{}", text(&output));
    assert_eq!(bench.ids("events"), [""; 0]);
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    assert_eq!(bench.loads(), bench.line(1, 10));
    assert!(bench.jobs()[3].0.ends_with("-g3"));
    assert_eq!(bench.ids("events"), ids(&rows(0, 10)));
}

#[test]
fn a_kill_after_the_job_is_sent_doubles_nothing() {
    for (name, keep_record) in [("kill_record", true), ("kill_lost", false)] {
        let (bench, proxy) = behind_proxy(name);
        bench.seal(&[("events", &rows(0, 10))]);
        proxy.script(PUT, UPLOAD, 1, Fault::HoldAnswer);
        kill_when_held(&bench, &proxy);
        assert_eq!(bench.ids("events"), ids(&rows(0, 10)));
        // More has been sealed by the next start, so another merge would begin at the same position.
        bench.seal(&[("events", &rows(10, 15))]);
        if !keep_record {
            std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
        }
        assert_eq!(bench.loads(), bench.line(1, 5));
        assert_eq!(bench.ids("events"), ids(&rows(0, 15)));
        assert_eq!(bench.jobs().len(), 2);
    }
}

#[test]
fn a_job_of_a_dead_process_that_still_runs_is_found_without_a_record() {
    let (bench, proxy) = behind_proxy("unseen");
    bench.seal(&[("events", &rows(0, 10))]);
    proxy.script(PUT, UPLOAD, 1, Fault::HoldAnswer);
    kill_when_held(&bench, &proxy);
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    bench.seal(&[("events", &rows(10, 15))]);
    // Its rows are not visible yet: the table seems empty, and the job is said to run.
    proxy.script(POST, "/queries", 1, Fault::Answer(200, r#"{"jobComplete":true,"rows":[]}"#));
    proxy.script(GET, JOB, 2, Fault::StillRunning);
    assert_eq!(bench.loads(), bench.line(1, 5));
    assert!(proxy.is_played());
    assert_eq!(bench.ids("events"), ids(&rows(0, 15)));
}

#[test]
fn a_kill_before_the_job_is_sent_loses_nothing() {
    for (name, method) in [("kill_post", POST), ("kill_put", PUT)] {
        let (bench, proxy) = behind_proxy(name);
        bench.seal(&[("events", &rows(0, 10))]);
        proxy.script(method, UPLOAD, 1, Fault::HoldRequest);
        kill_when_held(&bench, &proxy);
        assert_eq!(bench.loads(), bench.line(1, 10));
        assert_eq!(bench.ids("events"), ids(&rows(0, 10)));
        assert_eq!(bench.loaded(), 1);
    }
}

#[test]
fn two_copies_of_an_archive_make_one_chain() {
    for (name, early) in [("copies_put", false), ("copies_post", true)] {
        let (bench, proxy) = behind_proxy(name);
        bench.seal(&[("events", &rows(0, 10))]);
        proxy.script(PUT, UPLOAD, 1, Fault::HoldAnswer);
        let first = Guard(bench.upload(&["--once"]).stdout(Stdio::null()).spawn().unwrap());
        proxy.held.recv_timeout(Duration::from_secs(60)).unwrap();
        // The other process knows nothing of the first one: no lock, no record, and more batches.
        std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
        bench.seal(&[("events", &rows(10, 15))]);
        proxy.script(POST, "/queries", 1, Fault::Answer(200, r#"{"jobComplete":true,"rows":[]}"#));
        proxy.script(GET, JOB, 1, Fault::Answer(404, ABSENT));
        if early {
            let exists = r#"{"error":{"code":409,"message":"Already Exists: Job","errors":[{"reason":"duplicate"}]}}"#;
            proxy.script(POST, UPLOAD, 1, Fault::Answer(409, exists));
        }
        bench.loads();
        drop(first);
        assert!(proxy.is_played());
        assert_eq!(bench.ids("events"), ids(&rows(0, 15)));
        assert_eq!(bench.loaded(), 2);
    }
}

#[test]
fn history_is_sent_once_to_a_service_that_forgets_its_jobs() {
    let (bench, proxy) = behind_proxy("forgets");
    let copied: Vec<_> = (0..4).map(|n| row(1007 + 8 * n, 0, "r", n as i64)).collect();
    for row in &copied[..3] {
        bench.seal_history("events", std::slice::from_ref(row));
    }
    assert_eq!(bench.loads(), bench.line(3, 3));
    proxy.script(GET, JOB, usize::MAX, Fault::Answer(404, ABSENT));
    // Without the record nothing but the rows tells, of each file.
    std::fs::remove_dir_all(bench.archive().join(".upload")).unwrap();
    sends_nothing(&bench, &proxy, 3);
    // Nor where a job was sent and nobody has seen its end.
    bench.seal_history("events", &copied[3..]);
    proxy.script(PUT, UPLOAD, 1, Fault::HoldAnswer);
    kill_when_held(&bench, &proxy);
    sends_nothing(&bench, &proxy, 4);
    assert_eq!(bench.ids("events"), ids(&copied));
}

#[test]
fn a_file_of_history_that_always_fails_is_tried_less_and_less_often() {
    let (bench, proxy) = behind_proxy("fails_history");
    bench.seal_history("events", &[row(1007, 0, "r", 1)]);
    proxy.script(PUT, UPLOAD, usize::MAX, Fault::Garble);
    let mut command = bench.upload(&[]);
    let command = command.env("FALAJ_BIGQUERY__LOAD_EVERY", "1s").stdout(Stdio::null());
    let _process = Guard(command.spawn().unwrap());
    let sent = |jobs| until("jobs are sent", || proxy.count(&POST, UPLOAD) >= jobs);
    sent(1);
    let began = Instant::now();
    sent(4);
    let burnt = format!("/jobs/{}?", bench.jobs()[0].0);
    let asked = proxy.count(&GET, &burnt);
    sent(7);
    // Three at once, then 4 s, three more, 7 s; the time of a job is told in whole seconds.
    assert!(began.elapsed() > Duration::from_secs(9), "{:?}", began.elapsed());
    assert_eq!((proxy.count(&GET, &burnt), asked > 0), (asked, true));
}

#[test]
fn history_and_stream_take_turns_at_one_pace() {
    let (bench, proxy) = behind_proxy("pace");
    let copied: Vec<_> = (0..2).map(|n| row(1007 + 8 * n, 0, "r", n as i64)).collect();
    for row in &copied {
        bench.seal_history("events", std::slice::from_ref(row));
    }
    // Two schemas, two jobs.
    bench.seal(&[("events", &rows(100, 102))]);
    bench.seal_as(&[("events", &rows(102, 104))], true);
    let mut command = bench.upload(&[]);
    let command = command.env("FALAJ_BIGQUERY__LOAD_EVERY", "4s").stdout(Stdio::null());
    let _process = Guard(command.spawn().unwrap());
    let sent = (1..=4).map(|jobs| {
        until("a job is sent", || proxy.count(&POST, UPLOAD) >= jobs);
        Instant::now()
    });
    let sent: Vec<_> = sent.collect();
    let pauses: Vec<_> = sent.windows(2).map(|two| two[1] - two[0]).collect();
    // The time of a job is told in whole seconds.
    assert!(pauses.iter().all(|pause| *pause > Duration::from_secs(2)), "{pauses:?}");
    until("all is loaded", || bench.loaded() == 4);
    let of_history: Vec<_> = bench.jobs().iter().map(|(id, _)| id.contains("-events-r-")).collect();
    assert_eq!(of_history, [false, true, false, true]);
    assert_eq!(bench.ids("events"), ids(&[copied, rows(100, 104)].concat()));
}

/// Runs `upload` until so many files of history are loaded; no job is sent for it.
fn sends_nothing(bench: &Bench, proxy: &Proxy, files: usize) {
    let sent = proxy.count(&POST, UPLOAD);
    let mut command = bench.upload(&[]);
    let command = command.env("FALAJ_BIGQUERY__LOAD_EVERY", "1s").stdout(Stdio::null());
    let _process = Guard(command.spawn().unwrap());
    until("the history is known", || bench.loaded_history() == files || proxy.count(&POST, UPLOAD) > sent);
    assert_eq!(proxy.count(&POST, UPLOAD), sent);
}

#[test]
fn rights_and_a_wrong_address_are_refused_with_78() {
    let denied = r#"{"error":{"code":403,"message":"Access Denied: no","errors":[{"reason":"accessDenied"}]}}"#;
    for (name, fault, said) in [
        ("denied", Fault::Answer(403, denied), "HTTP 403 Forbidden: Access Denied: no"),
        ("address", Fault::Answer(404, "<html>nginx</html>"), "HTTP 404 Not Found: <html>nginx</html>"),
    ] {
        let (bench, proxy) = behind_proxy(name);
        bench.seal(&[("events", &rows(0, 10))]);
        proxy.script(GET, "/datasets/", 1, fault);
        let output = bench.once();
        assert_eq!(output.status.code(), Some(78), "{}", text(&output));
        assert!(text(&output).contains(said), "{}", text(&output));
        assert!(text(&output).contains("fix:"), "{}", text(&output));
    }
}

#[test]
fn a_server_that_does_not_answer_ends_the_start_with_69() {
    let mut bench = Bench::new("unreachable");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    bench.endpoint = format!("http://127.0.0.1:{port}");
    bench.seal(&[("events", &rows(0, 10))]);
    let begun = Instant::now();
    assert_eq!(bench.once().status.code(), Some(69));
    assert!(begun.elapsed() < Duration::from_secs(40));
}

#[test]
fn kills_at_random_moments_double_and_lose_nothing() {
    let bench = Bench::new("kills");
    let seed = rand::rng().random::<u64>();
    println!("seed {seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    for n in 0..10 {
        bench.seal(&[("a", &rows(n * 10, n * 10 + 10)), ("b", &rows(n * 10, n * 10 + 10))]);
        let command = &mut bench.upload(&["--once"]);
        let mut process = Guard(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let moment = Instant::now() + Duration::from_millis(random.random_range(10..900));
        while Instant::now() < moment && process.0.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        drop(process);
        if random.random_bool(0.3) {
            let _ = std::fs::remove_dir_all(bench.archive().join(".upload"));
        }
    }
    bench.loads();
    for table in ["a", "b"] {
        assert_eq!(bench.ids(table), ids(&rows(0, 100)), "seed {seed}");
    }
}

fn kill_when_held(bench: &Bench, proxy: &Proxy) {
    let _process = Guard(bench.upload(&["--once"]).stdout(Stdio::null()).spawn().unwrap());
    proxy.held.recv_timeout(Duration::from_secs(60)).unwrap();
}
