# The local BigQuery server, from PyPI, in a virtual environment under the system's own Python.
# shellcheck shell=bash disable=SC2154 # $stack, $cache and $parts come from dev/stack

readonly bigquery_version=0.4.0 duckdb_version=1.5.5
readonly bigquery_python=/usr/bin/python3

bigquery_packages() {
    [[ ! -d $cache/bigquery-$bigquery_version ]] || return 0
    [[ -x $bigquery_python ]] || echo python3
    "$bigquery_python" -c 'import ensurepip' 2>/dev/null || echo python3-venv
}

bigquery_install() {
    artefact "bigquery-$bigquery_version" "local-bigquery $bigquery_version from PyPI" bigquery_fetch
}

# It asks for a newer Python, DuckDB and numpy than it needs: hence first what it depends on, by name,
# and then the package itself without a look at its wishes.
bigquery_fetch() {
    local python=$1/venv/bin/python pip
    "$bigquery_python" -m venv "$1/venv"
    pip=("$python" -m pip install -q --disable-pip-version-check)
    "${pip[@]}" "duckdb==$duckdb_version" "duckdb-extension-icu==$duckdb_version" \
        "duckdb-extension-ducklake==$duckdb_version" "duckdb-extension-spatial==$duckdb_version" \
        fastapi fastavro google-cloud-bigquery-storage grpcio mini-racer numpy prompt-toolkit pyarrow \
        pydantic-settings pygments sqlglot uvicorn
    "${pip[@]}" --no-deps --ignore-requires-python "local-bigquery==$bigquery_version"
    local packages
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' ||
        "$python" "$parts/bigquery-mend.py" "$packages/local_bigquery"
    bigquery_extensions "$packages" "$1/home/.duckdb/extensions/v$duckdb_version"
    "$python" -m compileall -q "$packages/local_bigquery" || true
}

# DuckDB looks for its extensions under HOME.
bigquery_extensions() {
    mkdir -p "$2/linux_amd64"
    find "$1" -name '*.duckdb_extension' -exec mv -t "$2/linux_amd64" {} +
}

bigquery_start() {
    local home=$cache/bigquery-$bigquery_version
    mkdir -p "$stack/bigquery/data"
    spawn bigquery env -C "$stack/bigquery" HOME="$home/home" "$home/venv/bin/python" -c \
        'from local_bigquery.cli import main; main()' serve --host 127.0.0.1 \
        --port "$(port_of bigquery)" --grpc-port "$(port_of bigquery_grpc)" \
        --project local --data-dir "$stack/bigquery/data"
}

# Python with what the server is made of, pyarrow among it: the tests read Parquet with it.
bigquery_python() {
    install_packages bigquery >&2
    bigquery_install >&2
    exec "$cache/bigquery-$bigquery_version/venv/bin/python" "$@"
}

bigquery_more_ports() { echo bigquery_grpc; }

bigquery_ready() {
    exec 3<>"/dev/tcp/127.0.0.1/$(port_of bigquery)" || return 1
    local answer
    printf 'GET /bigquery/v2/projects/local/datasets HTTP/1.0\r\n\r\n' >&3
    read -r -t 10 answer <&3 || true
    exec 3>&-
    [[ $answer == HTTP/*\ 200* ]]
}

bigquery_stop_signal() { echo TERM; }

bigquery_log() { echo "$stack/bigquery.log"; }

bigquery_env() {
    export_line FALAJ_BIGQUERY__PROJECT local
    export_line FALAJ_BIGQUERY__ENDPOINT "http://$(address bigquery)"
}
