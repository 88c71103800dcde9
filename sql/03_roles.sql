-- Two roles, each with no more rights than its work needs.
--
--   falaj_stream   reads the slot and the published tables: produce, consume, upload, run, check, status, top, tap, verify, backfill
--   falaj_load     writes the two tables: generate
--
-- `falaj init` creates publication and slot and is run by the tables' owner with REPLICATION, or by a superuser.
-- No password stands here, so that nobody can log in with one until it is set:
--
--   psql -c '\password falaj_stream' -c '\password falaj_load'
--
-- and until pg_hba.conf lets the role in. A logical replication connection names its database there, not "replication":
--
--   hostssl  DATABASE  falaj_stream  ADDRESS  scram-sha-256
--
-- Repeatable.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'falaj_stream') THEN
        CREATE ROLE falaj_stream LOGIN REPLICATION;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'falaj_load') THEN
        CREATE ROLE falaj_load LOGIN;
    END IF;
END
$$;

GRANT USAGE ON SCHEMA public TO falaj_stream, falaj_load;

GRANT SELECT ON public.content, public.engagement_events TO falaj_stream;

GRANT SELECT, INSERT, UPDATE ON public.content TO falaj_load;
GRANT SELECT, INSERT, UPDATE, DELETE ON public.engagement_events TO falaj_load;
GRANT USAGE ON SEQUENCE public.engagement_events_id_seq TO falaj_load;
