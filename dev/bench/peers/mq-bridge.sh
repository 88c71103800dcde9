# mq-bridge from PyPI: a bridge with a core of its own in Rust, at-least-once, without enrichment.
# shellcheck shell=bash disable=SC2154 # $here and $cache come from peer

readonly mq_bridge_version=1.2.0 mq_bridge_python=/usr/bin/python3

mq_bridge_packages() {
    [[ ! -d $cache/mq-bridge-$mq_bridge_version ]] || return 0
    [[ -x $mq_bridge_python ]] || echo python3
    "$mq_bridge_python" -c 'import ensurepip' 2>/dev/null || echo python3-venv
}

mq_bridge_install() {
    artefact "mq-bridge-$mq_bridge_version" "mq-bridge $mq_bridge_version from PyPI" mq_bridge_fetch
}

mq_bridge_fetch() {
    "$mq_bridge_python" -m venv "$1/venv"
    "$1/venv/bin/python" -m pip install -q --disable-pip-version-check "mq-bridge==$mq_bridge_version"
}

# mq_bridge_run PEER DIR SLOT TARGET
mq_bridge_run() {
    cd "$2" || exit
    exec setpriv --pdeathsig TERM "$cache/mq-bridge-$mq_bridge_version/venv/bin/python" "$here/mq_bridge_route.py" \
        "${1#mq-bridge-}" "$3" "$4"
}
