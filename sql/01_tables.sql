-- The two source tables. Repeatable: what exists is left as it is.

CREATE TABLE IF NOT EXISTS public.content (
    id             UUID PRIMARY KEY,
    slug           TEXT UNIQUE NOT NULL,
    title          TEXT NOT NULL,
    content_type   TEXT CHECK (content_type IN ('podcast', 'newsletter', 'video')),
    length_seconds INTEGER,
    publish_ts     TIMESTAMPTZ NOT NULL
);

CREATE TABLE IF NOT EXISTS public.engagement_events (
    id           BIGSERIAL PRIMARY KEY,
    content_id   UUID REFERENCES public.content (id),
    user_id      UUID,
    event_type   TEXT CHECK (event_type IN ('play', 'pause', 'finish', 'click')),
    event_ts     TIMESTAMPTZ NOT NULL,
    duration_ms  INTEGER,
    device       TEXT,
    raw_payload  JSONB
);

-- Rows arrive nearly in the order of event_ts, so that a block range index finds a time window at almost no cost to the
-- writer. An index on content_id would slow every insert; add one where contents are deleted or joined from their side.
CREATE INDEX IF NOT EXISTS engagement_events_event_ts ON public.engagement_events USING brin (event_ts);
