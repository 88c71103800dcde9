#!/bin/bash
# Run once by the postgres image, after the files of sql/: gives the two roles their passwords from the environment.
set -euo pipefail
psql --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    --set stream="$FALAJ_STREAM_PASSWORD" --set load="$FALAJ_LOAD_PASSWORD" <<'SQL'
ALTER ROLE falaj_stream PASSWORD :'stream';
ALTER ROLE falaj_load PASSWORD :'load';
SQL
