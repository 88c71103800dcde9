-- What falaj streams. A lookup table has to be in the same publication as the table that it enriches.
-- Repeatable: a publication that exists is never altered.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'falaj') THEN
        CREATE PUBLICATION falaj FOR TABLE public.content, public.engagement_events;
    END IF;
END
$$;
