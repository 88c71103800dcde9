// The dashboard: asks this process for readiness, figures, status and board, each by itself, and shows what they say.
// Texts of others (titles, device names, errors) only ever become text nodes.
"use strict";

const EVERY = 1000; // ms between an answer and the next question
const SELDOM = 5000; // ms: for a status every server is connected to anew
const PATIENCE = 20000; // ms: a status or board may take so long while servers hang
const WINDOW = 15; // readings that rates and quantiles are taken over
const TRACE = 120; // readings in a trace

const $ = (id) => document.getElementById(id);

function element(name, text, className, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Only what is other than before is touched: a text can be selected, and a screen reader says it once.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function fill(node, children) {
  const fresh = node.cloneNode(false);
  fresh.append(...children);
  if (!node.isEqualNode(fresh)) node.replaceChildren(...fresh.childNodes);
}

// ---- asking ----

const answered = new Map(); // path → when it last answered

async function poll(path, every, read, show, isWanted = () => true) {
  answered.set(path, Date.now());
  for (;;) {
    if (document.hidden || !isWanted()) {
      answered.set(path, Date.now());
    } else {
      try {
        const answer = await fetch(path, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
        show(await read(answer), answer);
        answered.set(path, Date.now());
      } catch (e) {
        console.warn(path, e);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, every));
  }
}

// What stays on the page after its process has gone must not look alive.
function watch() {
  const [path, last] = [...answered].reduce((a, b) => (a[1] <= b[1] ? a : b));
  const silent = Date.now() - last > PATIENCE + SELDOM;
  document.body.classList.toggle("stale", silent);
  say($("stale"), silent ? `no answer to ${path} since ${new Date(last).toLocaleTimeString()}` : "");
}

// ---- numbers for people ----

const whole = (n) => Math.round(n).toLocaleString("en");
const records = (n) => `${whole(n)} ${n === 1 ? "record" : "records"}`;

function bytes(n) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (n < 999.5) return unit === "B" ? `${n} B` : `${n.toFixed(1)} ${unit}`;
    n /= 1000;
  }
  return `${n.toFixed(1)} TB`;
}

function time(seconds) {
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 120 ? `${seconds.toFixed(1)} s` : `${(seconds / 60).toFixed(1)} min`;
}

// ---- readiness ----

function showReadiness({ ready, failing }) {
  const names = Object.entries(failing);
  say($("readiness"), ready ? "ready" : "not ready");
  $("readiness").className = ready ? "good" : "bad";
  $("alarms").hidden = ready;
  fill($("alarms").firstElementChild, names.map(([name, why]) => element("li", `${name}: ${why}`)));
}

// ---- figures: the Prometheus text of this process ----

function parse(text) {
  const samples = new Map(); // name → [[labels, value]]
  for (const line of text.split("\n")) {
    const cut = line.lastIndexOf(" ");
    if (line.startsWith("#") || cut < 0) continue;
    const series = line.slice(0, cut);
    const brace = series.indexOf("{");
    const name = brace < 0 ? series : series.slice(0, brace);
    const labels = brace < 0 ? "" : series.slice(brace + 1, -1);
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push([labels, Number(line.slice(cut + 1))]);
  }
  const of = (name) => samples.get(name) ?? [];
  const bound = (labels) => Number(/(?:^|,)le="([^"]*)"/.exec(labels)?.[1].replace("+Inf", "Infinity"));
  return {
    at: performance.now(),
    has: (name) => samples.has(name),
    total: (name) => of(name).reduce((sum, [, value]) => sum + value, 0),
    label: (name, label) => of(name).find(([labels]) => labels.split(",").includes(label))?.[1],
    // Upper bound → samples up to it, over all other labels.
    buckets(name) {
      const sums = new Map();
      for (const [labels, value] of of(`${name}_bucket`)) {
        const le = bound(labels);
        sums.set(le, (sums.get(le) ?? 0) + value);
      }
      return sums;
    },
  };
}

// A quantile of what a histogram has got between two readings, interpolated within its bucket.
function quantile(before, now, name, q) {
  const earlier = before.buckets(name);
  const counts = [...now.buckets(name)].map(([le, n]) => [le, n - (earlier.get(le) ?? 0)]).sort((a, b) => a[0] - b[0]);
  const all = counts.at(-1)?.[1] ?? 0;
  if (!(all > 0)) return undefined;
  let [low, below] = [0, 0];
  for (const [le, n] of counts) {
    if (n >= all * q && n > below) return le === Infinity ? low : low + ((le - low) * (all * q - below)) / (n - below);
    [low, below] = [le, n];
  }
  return low;
}

const COUNTERS = [
  "falaj_produce_events_total",
  "falaj_consume_redis_events_total",
  "falaj_external_delivered_total",
  "falaj_upload_rows_total",
];
const readings = [];
const traces = new Map(); // title → past rates

function showFigures(text) {
  const now = parse(text);
  const last = readings.at(-1);
  // A counter that has fallen is of another process.
  if (last && COUNTERS.some((name) => now.total(name) < last.total(name))) readings.length = 0;
  readings.push(now);
  if (readings.length > WINDOW) readings.shift();
  const [before, previous] = [readings[0], readings.at(-2) ?? now];
  const rate = (from, name) => {
    const seconds = (now.at - from.at) / 1000;
    return seconds > 0 ? Math.max(0, now.total(name) - from.total(name)) / seconds : 0;
  };
  const delay = (name) => {
    const [p50, p99] = [0.5, 0.99].map((q) => quantile(before, now, name, q));
    return p50 === undefined ? ["–", ""] : [`${time(p50)}`, `p50; p99 ${time(p99)}`];
  };
  const tiles = [];
  const add = (needs, title, figure) => {
    if (now.has(needs)) tiles.push([title, ...figure()]);
  };
  const flow = (name, title, more) =>
    add(name, title, () => {
      const trace = traces.get(title) ?? [];
      traces.set(title, trace);
      if (readings.length > 1) trace.push(rate(previous, name));
      if (trace.length > TRACE) trace.shift();
      return [`${whole(rate(before, name))}/s`, more(), trace];
    });
  flow("falaj_produce_events_total", "events streamed", () => `${whole(now.total("falaj_produce_events_total"))} in all`);
  for (const sink of ["kafka", "archive"]) {
    const of = (name) => now.label(name, `sink="${sink}"`);
    if (of("falaj_produce_lag_seconds") === undefined) continue;
    tiles.push([`${sink} behind`, time(of("falaj_produce_lag_seconds")), bytes(of("falaj_produce_lag_bytes") ?? 0)]);
  }
  add("falaj_produce_lookup_rows", "lookup rows", () => {
    const [hits, misses] = ["hits", "misses"].map((what) => now.total(`falaj_produce_lookup_${what}_total`));
    return [whole(now.total("falaj_produce_lookup_rows")), `${whole(misses)} of ${whole(hits + misses)} events had none`];
  });
  add("falaj_produce_restarts_total", "sessions begun again", () => [whole(now.total("falaj_produce_restarts_total")), ""]);
  flow("falaj_consume_redis_events_total", "events on the board", () => `${records(now.total("falaj_consume_redis_lag_records"))} behind`);
  add("falaj_consume_redis_commit_to_applied_seconds_bucket", "commit → board", () => delay("falaj_consume_redis_commit_to_applied_seconds"));
  flow("falaj_external_delivered_total", "delivered outside", () =>
    `${whole(now.total("falaj_external_waiting_events"))} waiting, ${whole(now.total("falaj_external_dead_letters_total"))} dead letters`);
  add("falaj_external_latency_seconds_bucket", "commit → outside", () => delay("falaj_external_latency_seconds"));
  add("falaj_upload_rows_total", "rows loaded to BigQuery", () =>
    [whole(now.total("falaj_upload_rows_total")), `${whole(now.total("falaj_upload_pending_batches"))} files to come`]);
  const none = [element("p", "this process has no figures yet", "none")];
  fill($("figures"), tiles.length ? tiles.map(tile) : none);
}

function tile([title, figure, more, trace]) {
  const made = element("dl");
  made.append(element("dt", title), element("dd", figure));
  if (more) made.append(element("dd", more, "more"));
  if (trace?.length > 1) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    const top = Math.max(1, ...trace);
    const at = (rate, i) => `${TRACE - trace.length + i + 1},${(24 - (22 * rate) / top).toFixed(1)}`;
    line.setAttribute("points", trace.map(at).join(" "));
    for (const [key, value] of [["class", "trace"], ["viewBox", `0 0 ${TRACE} 25`], ["preserveAspectRatio", "none"], ["aria-hidden", "true"]]) {
      svg.setAttribute(key, value);
    }
    svg.append(line);
    const place = element("dd");
    place.append(svg);
    made.append(place);
  }
  return made;
}

// ---- status ----

function showStatus(status) {
  say($("pipeline"), status.pipeline);
  document.title = `falaj ${status.pipeline}`;
  say($("as-of"), `${status.as_of.slice(0, 19).replace("T", " ")} UTC`);
  const rows = [];
  const part = (name, value, told) => {
    if (value.error !== undefined) rows.push([name, value.error, "not known", "bad"]);
    else rows.push([name, ...told(value)]);
  };
  const reader = (r) => {
    const at = r.partitions.map((p) => `${p.partition}: ${p.offset ?? "–"} of ${p.end}`).join(", ");
    return [`${r.topic} (${at})`, records(r.lag_records)];
  };
  part("slot", status.slot, (s) => [
    `${s.name} acknowledged to ${s.confirmed_flush_lsn}; the server is at ${s.server_lsn} and keeps ` +
      `${s.retained_wal_bytes === null ? "no WAL" : bytes(s.retained_wal_bytes)} for it (${s.wal_status ?? "no WAL reserved"}); ` +
      (s.active_pid === null ? "nobody reads it" : `read through pid ${s.active_pid}`),
    bytes(s.lag_bytes),
    s.wal_status === "lost" || s.wal_status === "unreserved" ? "bad" : "",
  ]);
  for (const sink of status.sinks) {
    part(sink.name, sink, (s) => [
      s.position === null ? "has never stored a position" : `durable to ${s.position}${s.partial ? `, within a transaction at ${s.partial}` : ""}`,
      s.lag_bytes === null ? "" : bytes(s.lag_bytes),
    ]);
  }
  part("batches", status.archive, (a) => [a.batches ? `${whole(a.batches)} in ${a.dir}${a.last ? `, the last ${a.last}` : ""}` : `none in ${a.dir}`, ""]);
  const tables = (name, value, told) => (Array.isArray(value) ? value.forEach((v) => rows.push([name, ...told(v)])) : part(name, value, told));
  tables("backfill", status.backfill, (b) => [
    b.finished ? `${b.table} whole: ${whole(b.rows)} rows` : `${b.table}: ${whole(b.rows)} of about ${whole(b.estimated_rows)} rows`,
    b.finished ? "" : `${b.ranges - b.ranges_done} of ${b.ranges} ranges`,
  ]);
  if (status.board !== null) part("board", status.board, reader);
  if (status.external !== null) part("outside system", status.external, reader);
  $("ranking").hidden = $("in-use").hidden = status.board === null;
  if (status.upload !== null) {
    tables("BigQuery", status.upload, (t) => [`${t.table} loaded to ${t.loaded ?? "nothing"}`, `${whole(t.pending_files)} files`]);
  }
  const row = ([name, place, behind, state]) => {
    const made = element("tr", undefined, state);
    made.append(element("th", name, "", { scope: "row" }), element("td", place, "place"), element("td", behind, "number"));
    return made;
  };
  fill($("parts").tBodies[0], rows.map(row));
}

// ---- board ----

function showBoard(board, answer) {
  const empty = (columns, text) => {
    const made = element("tr");
    made.append(element("td", text, "none", { colspan: columns }));
    return [made];
  };
  if (!answer.ok) {
    fill($("contents").tBodies[0], empty(6, board.error));
    fill($("devices").tBodies[0], empty(3, "not known"));
    say($("left-out"), "");
    return;
  }
  const contents = board.top.map((c) => {
    const made = element("tr");
    made.append(
      element("td", c.rank, "number"),
      element("td", c.title ?? c.content_id, "text", { dir: "auto", title: c.content_id }),
      element("td", c.content_type ?? "–", "text", { dir: "auto" }),
      element("td", c.engagement_seconds.toLocaleString("en", { minimumFractionDigits: 3 }), "number"),
      element("td", whole(c.events), "number"),
      element("td", whole(c.users), "number"),
    );
    return made;
  });
  const shown = board.devices.slice(0, 10);
  const devices = shown.map((d) => {
    const made = element("tr");
    made.append(
      element("td", d.device ?? "(null)", d.device === null ? "text none" : "text", { dir: "auto" }),
      element("td", whole(d.events), "number"),
      element("td", d.last_seen.slice(11, 19)),
    );
    return made;
  });
  fill($("contents").tBodies[0], contents.length ? contents : empty(6, "no events in the last 10 minutes"));
  fill($("devices").tBodies[0], devices.length ? devices : empty(3, "none"));
  const more = board.devices.length - shown.length;
  const told = [];
  if (more > 0) told.push(`and ${whole(more)} more devices`);
  if (board.late_dropped + board.future_dropped > 0) {
    told.push(`left out: ${whole(board.late_dropped)} late, ${whole(board.future_dropped)} from the future`);
  }
  say($("left-out"), told.join("; "));
}

const json = (answer) => answer.json();
poll("readyz", EVERY, json, showReadiness);
poll("metrics", EVERY, (answer) => answer.text(), showFigures);
poll("api/v1/status", SELDOM, json, showStatus);
poll("api/v1/board?top=10", EVERY, json, showBoard, () => !$("ranking").hidden);
setInterval(watch, EVERY);
