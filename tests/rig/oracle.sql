-- An account of every row change, kept by triggers in the same transactions, in a table that is not published. The order
-- of the commits and their LSNs come from a second slot. From the two, views compute every event's bytes.

CREATE TABLE ledger (
    seq     bigserial PRIMARY KEY,
    xid     bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    op      text NOT NULL,
    old_id  text,
    content content,
    event   engagement_events
);
CREATE INDEX ON ledger (xid, seq);

CREATE FUNCTION ledger_content() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.ledger (op, old_id, content) VALUES (
        CASE TG_OP WHEN 'INSERT' THEN 'c' WHEN 'UPDATE' THEN 'u' ELSE 'd' END,
        CASE WHEN TG_OP = 'UPDATE' AND OLD.id <> NEW.id THEN to_json(OLD.id)::text END,
        CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END);
    RETURN NULL;
END $$;
CREATE TRIGGER ledger AFTER INSERT OR UPDATE OR DELETE ON content FOR EACH ROW EXECUTE FUNCTION ledger_content();

CREATE FUNCTION ledger_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.ledger (op, old_id, event) VALUES (
        CASE TG_OP WHEN 'INSERT' THEN 'c' WHEN 'UPDATE' THEN 'u' ELSE 'd' END,
        CASE WHEN TG_OP = 'UPDATE' AND OLD.id <> NEW.id THEN to_json(OLD.id)::text END,
        CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END);
    RETURN NULL;
END $$;
CREATE TRIGGER ledger AFTER INSERT OR UPDATE OR DELETE ON engagement_events
    FOR EACH ROW EXECUTE FUNCTION ledger_event();

CREATE TABLE commits (n bigint, xid bigint PRIMARY KEY, commit_lsn bytea, end_lsn pg_lsn, at timestamptz);

CREATE FUNCTION big(bytes bytea) RETURNS bigint IMMUTABLE LANGUAGE sql AS
    $$ SELECT ('x' || encode(bytes, 'hex'))::bit(64)::bigint $$;

-- A row change with its place: transaction n, ordinal within it. What was there before the slot has n = 0.
CREATE TABLE numbered (n bigint, ordinal bigint, op text, old_id text, content content, event engagement_events, own text, id text);

CREATE FUNCTION oracle_commits(upto pg_lsn) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- Commit is C, flags (1), commit LSN (8), end LSN (8), µs since 2000 (8).
    DELETE FROM commits;
    INSERT INTO commits
    SELECT row_number() OVER (), xid::text::bigint, substring(data FROM 3 FOR 8), '0/0'::pg_lsn + big(substring(data FROM 11 FOR 8)),
           timestamptz '2000-01-01 00:00:00Z' + big(substring(data FROM 19 FOR 8)) * interval '1 us'
    FROM pg_logical_slot_peek_binary_changes((current_database() || '_oracle')::name, NULL, NULL,
             'proto_version', '1', 'publication_names', 'falaj')
    WHERE get_byte(data, 0) = 67;
    DELETE FROM commits WHERE end_lsn > upto;
END $$;

CREATE FUNCTION oracle_number() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    TRUNCATE numbered;
    INSERT INTO numbered
    SELECT coalesce(c.n, 0), row_number() OVER (PARTITION BY l.xid ORDER BY l.seq) - 1, l.op, l.old_id, l.content, l.event,
           NULL, upper(encode(c.commit_lsn, 'hex'))
    FROM ledger l LEFT JOIN commits c USING (xid)
    WHERE c.xid IS NOT NULL OR l.xid < (SELECT min(xid) FROM commits);
    UPDATE numbered k SET id = k.id || ':' || lpad(ordinal::text, 10, '0'),
        own = format('"_id":"%s:%s","_op":"%s","_table":"%s","_lsn":"%s","_commit_ts":"%s"%s}', k.id, lpad(ordinal::text, 10, '0'), op,
            CASE WHEN event IS NULL THEN 'content' ELSE 'engagement_events' END,
            '0/0'::pg_lsn + big(c.commit_lsn), utc(at), ',"_old_key":{"id":' || old_id || '}')
    FROM commits c WHERE c.n = k.n;
END $$;

CREATE FUNCTION utc(at timestamptz) RETURNS text STABLE LANGUAGE sql AS
    $$ SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') $$;

-- A value as it stands in JSON.
CREATE FUNCTION j(value anyelement) RETURNS text STABLE LANGUAGE sql AS
    $$ SELECT coalesce(to_json(value)::text, 'null') $$;

CREATE INDEX ON numbered (((content).id), n, ordinal);

CREATE VIEW oracle_content AS
SELECT id, (content).id::text AS key, CASE WHEN op = 'd'
    THEN format('{"id":%s,"slug":null,"title":null,"content_type":null,"length_seconds":null,"publish_ts":null,%s', j((content).id), own)
    ELSE format('{"id":%s,"slug":%s,"title":%s,"content_type":%s,"length_seconds":%s,"publish_ts":"%s",%s', j((content).id),
        j((content).slug), j((content).title), j((content).content_type), j((content).length_seconds),
        utc((content).publish_ts), own)
    END AS body
FROM numbered WHERE n > 0 AND content IS DISTINCT FROM NULL;

-- An event with the content row that it must show: the last one before the event's own place, unless that was a delete.
CREATE VIEW seen AS
SELECT k.*, looked, seconds, c.at
FROM numbered k
JOIN commits c USING (n)
CROSS JOIN LATERAL (SELECT round((event).duration_ms / 1000.0, 3) AS seconds) AS s
LEFT JOIN LATERAL (
    SELECT CASE WHEN c.op <> 'd' THEN c.content END AS looked FROM numbered c
    WHERE (c.content).id = (k.event).content_id AND (c.n, c.ordinal) < (k.n, k.ordinal)
    ORDER BY c.n DESC, c.ordinal DESC LIMIT 1
) AS l ON true
WHERE event IS DISTINCT FROM NULL;

CREATE VIEW oracle_engagement_events AS
SELECT id, coalesce((CASE WHEN op <> 'd' THEN (event).content_id END)::text, (event).id::text) AS key, CASE WHEN op = 'd'
    THEN format('{"id":%s,"content_id":null,"user_id":null,"event_type":null,"event_ts":null,"duration_ms":null,"device":null,'
        '"raw_payload":null,"title":null,"content_type":null,"length_seconds":null,"engagement_seconds":null,"engagement_pct":null,%s',
        (event).id, own)
    ELSE format('{"id":%s,"content_id":%s,"user_id":%s,"event_type":%s,"event_ts":"%s","duration_ms":%s,"device":%s,"raw_payload":%s,'
        '"title":%s,"content_type":%s,"length_seconds":%s,"engagement_seconds":%s,"engagement_pct":%s,%s',
        (event).id, j((event).content_id), j((event).user_id), j((event).event_type), utc((event).event_ts),
        j((event).duration_ms), j((event).device), coalesce((event).raw_payload::text, 'null'),
        j((looked).title), j((looked).content_type), j((looked).length_seconds), coalesce(seconds::text, 'null'),
        coalesce(CASE WHEN (looked).length_seconds > 0 THEN round(seconds / (looked).length_seconds, 2) END::text, 'null'), own)
    END AS body
FROM seen;

-- The board at a moment, as `falaj board --json` prints it.
CREATE FUNCTION oracle_board(as_of timestamptz) RETURNS text LANGUAGE sql AS $$
    WITH bounds AS (SELECT floor(extract(epoch FROM as_of) / 10) AS last),
    marked AS (
        SELECT s.*, (event).event_ts < at - interval '600 s' AS late, (event).event_ts > at + interval '60 s' AS future,
            floor(extract(epoch FROM (event).event_ts) / 10) BETWEEN last - 59 AND last AS shown,
            floor(extract(epoch FROM at) / 10) BETWEEN last - 59 AND last AS committed
        FROM seen s, bounds WHERE op = 'c'
    ),
    counted AS (SELECT * FROM marked WHERE shown AND NOT late AND NOT future),
    newest AS (
        SELECT DISTINCT ON ((event).content_id) (event).content_id AS content_id, (looked).title, (looked).content_type
        FROM marked ORDER BY (event).content_id, id DESC
    ),
    ranked AS (
        SELECT row_number() OVER (ORDER BY sum(coalesce(seconds, 0)) DESC, count(*) DESC, (event).content_id) AS rank,
            (event).content_id AS content_id, sum(coalesce(seconds, 0.000)) AS seconds, count(*) AS events,
            count(DISTINCT (event).user_id) AS users
        FROM counted WHERE (event).content_id IS NOT NULL GROUP BY (event).content_id
    ),
    used AS (
        SELECT row_number() OVER (ORDER BY count(*) DESC, (event).device COLLATE "C") AS place, (event).device,
            count(*) AS events, max((event).event_ts) AS seen
        FROM counted GROUP BY (event).device
    )
    SELECT json_build_object('window_seconds', 600,
        'top', (SELECT json_agg(json_build_object('rank', rank, 'content_id', content_id, 'title', title, 'content_type', content_type,
                'engagement_seconds', seconds, 'events', events, 'users', users) ORDER BY rank) FROM ranked JOIN newest USING (content_id)),
        'devices', (SELECT json_agg(json_build_object('device', device, 'events', events, 'last_seen', utc(seen)) ORDER BY place) FROM used),
        'late_dropped', count(*) FILTER (WHERE late AND committed), 'future_dropped', count(*) FILTER (WHERE future AND committed))::text
    FROM marked
$$;
