# Installing: Debian packages, and the artefacts that all stacks share in the cache.
# shellcheck shell=bash disable=SC2154 # $cache and $parts come from dev/stack

# Installs the Debian packages that the named servers lack, in one go.
install_packages() {
    local server wanted=()
    for server in "$@"; do
        mapfile -t -O "${#wanted[@]}" wanted < <("${server}_packages")
    done
    ((${#wanted[@]})) || return 0
    mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | sort -u)
    { ((EUID == 0)) && command -v apt-get >/dev/null; } || explain_packages "${wanted[@]}"
    local began=$EPOCHREALTIME
    echo "install   Debian packages: ${wanted[*]}"
    strictly apt_install "${wanted[@]}" >"$cache/apt.log" 2>&1 || fail_with_log "apt-get install ${wanted[*]}" "$cache/apt.log"
    echo "install   Debian packages: done in $(since "$began") s"
}

explain_packages() {
    local why="it is not run by root"
    command -v apt-get >/dev/null || why="this machine has no apt-get"
    echo "${program:-dev/stack}: missing: $*; $why and cannot install them." >&2
    echo "Try: sudo apt-get update && sudo apt-get install $*" >&2
    echo "(or your system's packages for the same programs, then run it again)" >&2
    exit 1
}

# Debian starts a service as soon as it is installed, on the well-known port; while we install it
# must not, nor make a database cluster that nobody asked for.
apt_install() {
    exec 9>"$cache/apt.lock"
    flock 9
    local apt=(apt-get -qq -y -o DPkg::Lock::Timeout=300 --no-install-recommends)
    undo=() # read at the exit, when locals are gone
    trap 'rm -f "${undo[@]}"' EXIT
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
        undo+=(/usr/sbin/policy-rc.d)
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
    fi
    "${apt[@]}" update
    if [[ " $* " == *" postgresql-15 "* ]]; then
        "${apt[@]}" install postgresql-common
        undo+=(/etc/postgresql-common/createcluster.d/falaj-stack.conf)
        mkdir -p /etc/postgresql-common/createcluster.d
        echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/falaj-stack.conf
    fi
    "${apt[@]}" install "$@"
    # Nor at the next boot.
    [[ " $* " != *" redis-server "* ]] || update-rc.d redis-server disable
}

# artefact NAME DESCRIPTION COMMAND…: makes $cache/NAME once, under a lock, by running
# COMMAND… TEMPORARY_DIRECTORY, which appears under its name only when it is whole.
artefact() {
    local name=$1 what=$2 began=$EPOCHREALTIME
    shift 2
    [[ ! -d $cache/$name ]] || return 0
    mkdir -p "$cache"
    (
        exec 9>"$cache/$name.lock"
        flock 9
        [[ ! -d $cache/$name ]] || exit 0
        echo "install   $what …"
        rm -rf "$cache/$name.new"
        mkdir "$cache/$name.new"
        strictly "$@" "$cache/$name.new" >"$cache/$name.log" 2>&1 9>&- ||
            fail_with_log "installing $what" "$cache/$name.log"
        mv "$cache/$name.new" "$cache/$name"
        echo "install   $what: done in $(since "$began") s"
    ) || exit 1
}

fail_with_log() {
    echo "${program:-dev/stack}: $1 failed; the end of $2:" >&2
    tail -n 20 "$2" >&2
    exit 1
}

# Copies from Maven, by coordinates: maven_copy DIRECTORY GOAL PARAMETER…
readonly maven_plugin=org.apache.maven.plugins:maven-dependency-plugin:3.8.1
maven_copy() {
    local to=$1 goal=$2
    shift 2
    mvn -B -ntp -q "$maven_plugin:$goal" "-DoutputDirectory=$to" "$@"
}

maven_package() { command -v mvn >/dev/null || echo maven; }
