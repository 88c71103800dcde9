# syntax=docker/dockerfile:1
# A BigQuery server for trying falaj out: local-bigquery from PyPI. Not for production.

FROM python:3.13-slim-bookworm
ENV HOME=/var/lib/bigquery PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The package is installed without its own wishes: this DuckDB and these extensions are what falaj is tested with.
# hadolint ignore=DL3013
RUN pip install duckdb==1.5.5 duckdb-extension-icu==1.5.5 duckdb-extension-ducklake==1.5.5 duckdb-extension-spatial==1.5.5 \
        fastapi fastavro google-cloud-bigquery-storage grpcio mini-racer numpy prompt-toolkit pyarrow pydantic-settings pygments \
        sqlglot uvicorn \
    && pip install --no-deps local-bigquery==0.4.0 \
    && useradd --system --uid 10001 --user-group --home-dir /var/lib/bigquery --create-home bigquery \
    && install -d -o bigquery -g bigquery /var/lib/bigquery/data
USER 10001:10001
WORKDIR /var/lib/bigquery
# DuckDB looks for its extensions under the home directory.
RUN mkdir -p "/var/lib/bigquery/.duckdb/extensions/v1.5.5/linux_amd64" \
    && find /usr/local/lib/python3.13 -name '*.duckdb_extension' \
        -exec cp -t "/var/lib/bigquery/.duckdb/extensions/v1.5.5/linux_amd64" {} +
EXPOSE 9050
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=10 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9050/bigquery/v2/projects/local/datasets', timeout=4)"]
CMD ["local-bigquery", "serve", "--host", "0.0.0.0", "--port", "9050", "--grpc-port", "9060", "--project", "local", "--data-dir", "/var/lib/bigquery/data"]
