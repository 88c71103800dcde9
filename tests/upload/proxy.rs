//! A reverse proxy before the BigQuery server that plays scripted faults.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;

/// What becomes of a request.
#[derive(Clone)]
pub enum Fault {
    /// None.
    Pass,
    /// It is answered with this status and body, and goes no further.
    Answer(u16, &'static str),
    /// It reaches the server, and its answer breaks off.
    LoseAnswer,
    /// It reaches the server, and its answer never comes; the test is told.
    HoldAnswer,
    /// It never reaches the server nor gets an answer; the test is told.
    HoldRequest,
    /// It reaches the server with a body that is no Parquet.
    Garble,
    /// It reaches the server, and the answer says that every byte is there, but nothing of a job.
    HasEveryByte,
    /// The job in its answer is said to run still.
    StillRunning,
}

struct Rule {
    method: Method,
    part: &'static str,
    times: usize,
    fault: Fault,
}

/// The proxy; it runs until the test's process ends.
pub struct Proxy {
    pub endpoint: String,
    pub held: Receiver<()>,
    shared: Arc<Shared>,
}

struct Shared {
    server: String,
    client: reqwest::Client,
    rules: Mutex<Vec<Rule>>,
    seen: Mutex<Vec<String>>,
    held: Mutex<Sender<()>>,
}

impl Proxy {
    pub fn before(server: &str) -> Self {
        let (sender, held) = channel();
        let shared = Arc::new(Shared {
            server: server.to_owned(),
            client: reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap(),
            rules: Mutex::default(),
            seen: Mutex::default(),
            held: Mutex::new(sender),
        });
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        listener.set_nonblocking(true).unwrap();
        let app = axum::Router::new().fallback(pass).with_state(shared.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, app).await.unwrap();
            });
        });
        Self { endpoint, held, shared }
    }

    /// The next `times` requests of that method whose address contains `part` meet the fault.
    pub fn script(&self, method: Method, part: &'static str, times: usize, fault: Fault) {
        self.shared.rules.lock().unwrap().push(Rule { method, part, times, fault });
    }

    /// How many requests of that method with that part have come.
    pub fn count(&self, method: &Method, part: &str) -> usize {
        let seen = self.shared.seen.lock().unwrap();
        seen.iter().filter(|s| s.starts_with(method.as_str()) && s.contains(part)).count()
    }

    /// Whether every scripted fault has happened.
    pub fn is_played(&self) -> bool {
        self.shared.rules.lock().unwrap().iter().all(|rule| rule.times == 0)
    }
}

async fn pass(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
    let range = head.headers.get(header::CONTENT_RANGE).map_or("", |range| range.to_str().unwrap());
    shared.seen.lock().unwrap().push(format!("{} {path} {range}", head.method));
    let fault = shared.next(&head.method, &path);
    let body = to_bytes(body, usize::MAX).await.unwrap();
    match fault {
        None | Some(Fault::Pass) => shared.forward(head.method, &path, head.headers, body).await,
        Some(Fault::Answer(status, text)) => Response::builder().status(status).body(Body::from(text)).unwrap(),
        Some(Fault::LoseAnswer) => {
            shared.forward(head.method, &path, head.headers, body).await;
            let cut = futures_util::stream::once(async { Err::<Bytes, _>(std::io::Error::other("cut")) });
            Response::new(Body::from_stream(cut))
        }
        Some(Fault::HoldAnswer) => {
            shared.forward(head.method, &path, head.headers, body).await;
            shared.hold().await
        }
        Some(Fault::HoldRequest) => shared.hold().await,
        Some(Fault::Garble) => {
            let noise = Bytes::from(vec![b'x'; body.len()]);
            shared.forward(head.method, &path, head.headers, noise).await
        }
        Some(Fault::HasEveryByte) => {
            let range = format!("bytes=0-{}", body.len() - 1);
            shared.forward(head.method, &path, head.headers, body).await;
            Response::builder().status(308).header(header::RANGE, range).body(Body::empty()).unwrap()
        }
        Some(Fault::StillRunning) => {
            let answer = shared.forward(head.method, &path, head.headers, body).await;
            let (mut head, body) = answer.into_parts();
            let body = to_bytes(body, usize::MAX).await.unwrap();
            let mut job: serde_json::Value = serde_json::from_slice(&body).unwrap();
            job["status"] = serde_json::json!({ "state": "RUNNING" });
            head.headers.remove(header::CONTENT_LENGTH);
            Response::from_parts(head, Body::from(job.to_string()))
        }
    }
}

impl Shared {
    fn next(&self, method: &Method, path: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|r| r.times > 0 && r.method == *method && path.contains(r.part))?;
        rule.times -= 1;
        Some(rule.fault.clone())
    }

    async fn hold(&self) -> Response {
        self.held.lock().unwrap().send(()).unwrap();
        std::future::pending().await
    }

    async fn forward(&self, method: Method, path: &str, headers: HeaderMap, body: Bytes) -> Response {
        let url = format!("{}{path}", self.server);
        let answer = self.client.request(method, url).headers(headers).body(body).send().await.unwrap();
        let mut response = Response::builder().status(StatusCode::from_u16(answer.status().as_u16()).unwrap());
        for (name, value) in answer.headers().iter().filter(|(name, _)| *name != header::TRANSFER_ENCODING) {
            response = response.header(name, value);
        }
        response.body(Body::from(answer.bytes().await.unwrap())).unwrap()
    }
}
