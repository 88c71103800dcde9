//! The dashboard, in a browser: Debian's Chromium without a window, which prints the page as its script has left it.

use std::process::Command;

use tempfile::tempdir;

use super::troupe::{Http, Stage, until};

/// A title that would be markup, and one that is written from right to left.
const HOSTILE: &str = "<img src=x onerror=\"document.title='taken'\"><b>bold</b> & more";
const ARABIC: &str = "قناة الماء";
/// Virtual time: the page asks, and asks again.
const BUDGET: &str = "--virtual-time-budget=6000";

/// The page's elements after some seconds.
async fn elements(http: &Http) -> String {
    let url = format!("http://{}/", http.address);
    let run = move || {
        let profile = tempdir().unwrap();
        let quiet = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"];
        let quiet = quiet.into_iter().chain(["disable-component-update", "disable-sync", "disable-dev-shm-usage"]);
        let mut browser = Command::new("timeout");
        browser.args(["60", "chromium", "--headless", "--no-sandbox"]).args(quiet.map(|flag| format!("--{flag}")));
        browser.arg(format!("--user-data-dir={}", profile.path().display()));
        let done = browser.args([BUDGET, "--dump-dom", &url]).output().unwrap();
        let why = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "chromium, which dev/setup test installs: {}: {why}", done.status);
        String::from_utf8(done.stdout).unwrap()
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

/// The text of each cell of a table's body, row by row; entities as they stand in the page.
fn rows(page: &str, table: &str) -> Vec<Vec<String>> {
    let inner = |text: &str, from: &str, to: &str| -> String {
        let start = text.find(from).unwrap_or_else(|| panic!("no {from} in {text}")) + from.len();
        text[start..start + text[start..].find(to).unwrap()].to_owned()
    };
    let body = inner(&inner(page, &format!("id=\"{table}\""), "</table>"), "<tbody>", "</tbody>");
    let cell = |cell: &str| cell.split_once('>').unwrap().1.split("</").next().unwrap().to_owned();
    let cells = |row: &str| row.replace("<th", "<td").split("<td").skip(1).map(cell).collect();
    body.split("<tr").skip(1).map(cells).collect()
}

#[tokio::test]
async fn the_dashboard_shows_readiness_places_figures_and_the_board() {
    let stage = Stage::new("page").await;
    let run = stage.start(&["run"]);
    let http = run.http().await;
    let sql = stage.sql().await;
    for (n, (title, seconds)) in [(HOSTILE, 90), (ARABIC, 60)].into_iter().enumerate() {
        let id = format!("00000000-0000-0000-0000-00000000000{n}");
        let content = "INSERT INTO public.content (id, slug, title, content_type, length_seconds, publish_ts) \
            VALUES ($1::text::uuid, $1, $2, 'video', 600, now())";
        sql.execute(content, &[&id, &title]).await.unwrap();
        let event = "INSERT INTO public.engagement_events (content_id, user_id, event_type, event_ts, duration_ms, device) \
            VALUES ($1::text::uuid, gen_random_uuid(), 'play', now(), $2, 'web-<i>safari</i>')";
        sql.execute(event, &[&id, &(seconds * 1000)]).await.unwrap();
    }
    let on_board = async || http.json("/api/v1/board").await["top"].as_array().unwrap().len() == 2;
    until("both are on the board", on_board).await;
    until("both are delivered", async || stage.mock.received().counts().unique == 2).await;
    until("it is ready", async || http.get("/readyz").await.0 == 200).await;

    let page = elements(&http).await;
    let contents = rows(&page, "contents");
    let escaped = HOSTILE.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    assert_eq!(contents[0], ["1", escaped.as_str(), "video", "90.000", "1", "1"]);
    assert_eq!(contents[1], ["2", ARABIC, "video", "60.000", "1", "1"]);
    let devices = rows(&page, "devices");
    assert_eq!(devices[0][..2], ["web-&lt;i&gt;safari&lt;/i&gt;", "2"]);
    assert!(!page.contains("<img"), "{page}");
    assert!(page.contains("<p id=\"readiness\" role=\"status\" class=\"good\">ready</p>"), "{page}");
    let parts: Vec<_> = rows(&page, "parts").into_iter().map(|row| row[0].clone()).collect();
    assert_eq!(parts, ["slot", "kafka", "archive", "batches", "board", "outside system"]);
    for figure in ["events streamed", "kafka behind", "archive behind", "events on the board", "delivered outside"] {
        assert!(page.contains(&format!("<dt>{figure}</dt>")), "{figure}: {page}");
    }
}

/// What fails is named with its reason, and the rest of the page is there.
#[tokio::test]
async fn the_dashboard_names_what_fails() {
    let mut stage = Stage::new("failing").await;
    let owner = stage.start(&["produce"]);
    let first = owner.http().await;
    until("the owner is ready", async || first.get("/readyz").await.0 == 200).await;
    stage.set("FALAJ_REDIS__URL", "redis://127.0.0.1:1/0");
    let standby = stage.start(&["produce"]);
    let http = standby.http().await;
    until("it waits", async || http.get("/readyz").await.1.contains("\"slot\":")).await;
    let page = elements(&http).await;
    assert!(page.contains("class=\"bad\">not ready</p>"), "{page}");
    assert!(page.contains("<li>slot: ") && page.contains("<li>replication: starting</li>"), "{page}");
    let board = rows(&page, "parts").into_iter().find(|row| row[0] == "board").unwrap();
    assert_eq!(board[2], "not known");
    assert!(board[1].contains("127.0.0.1:1"), "{board:?}");
}

/// The page may load nothing but its own parts, and each of them is there.
#[tokio::test]
async fn the_page_refers_to_nothing_but_what_the_process_serves() {
    let stage = Stage::new("parts").await;
    let produce = stage.start(&["produce"]);
    let http = produce.http().await;
    until("it has figures", async || !http.get("/metrics").await.1.is_empty()).await;
    let answer = reqwest::get(format!("http://{}/", http.address)).await.unwrap();
    let policy = answer.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.starts_with("default-src 'none'; script-src 'self'; style-src 'self';"), "{policy}");
    let page = answer.text().await.unwrap();
    let referred: Vec<&str> = page.split('"').skip(1).step_by(2).collect();
    assert!(referred.iter().all(|value| !value.contains("//")), "{referred:?}");
    let links = page.split("href=\"").chain(page.split("src=\"")).skip(1);
    let link = |rest: &str| rest.split('"').next().unwrap().to_owned();
    let links: Vec<String> = links.map(link).filter(|link| !link.contains([':', '<'])).collect();
    assert_eq!(links.len(), 7, "{links:?}");
    for link in links {
        let (status, body) = http.get(&format!("/{link}")).await;
        assert!(matches!(status, 200 | 503) && !body.is_empty(), "{link}: {status}");
    }
}
