# Ports, pids, starting and stopping: what all servers have in common.
# shellcheck shell=bash disable=SC2154 # $stack and $servers come from dev/stack

# The port under NAME in $stack/ports; a NAME is a server's or, for a second port, SERVER_what.
port_of() { awk -v name="$1" '$1 == name { print $2; found = 1 } END { exit !found }' "$stack/ports" 2>/dev/null; }

address() { echo "127.0.0.1:$(port_of "$1")"; }

# Chooses the server's ports at its first start.
claim_ports() {
    local name
    for name in "$1" $("${1}_more_ports" 2>/dev/null || true); do
        port_of "$name" >/dev/null || (
            exec 9>"$stack/ports.lock"
            flock 9
            echo "$name $(free_port)" >>"$stack/ports"
        )
    done
}

# Below the range that the kernel gives to outgoing connections: such a port is still free when the
# server comes back to it.
free_port() {
    local port
    while true; do
        port=$((20000 + RANDOM % 12000))
        grep -qw "$port" "$stack/ports" || listening "$port" || break
    done
    echo "$port"
}

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

pid_file() { echo "$stack/run/$1.pid"; }

# The pid, if the server runs. A pid that another program got since is not taken for it: each
# server has the stack's directory in its command line.
pid_of() {
    local pid
    pid=$(cat "$(pid_file "$1")" 2>/dev/null) || return 1
    grep -qaF "$(home_of "$1")/" "/proc/$pid/cmdline" 2>/dev/null || return 1
    echo "$pid"
}

# The directory with the server's data; Postgres may have to keep it elsewhere.
home_of() {
    if [[ $1 == postgres ]]; then postgres_home; else echo "$stack/$1"; fi
}

# spawn SERVER COMMAND…: in a session of its own, so that Ctrl-C in a terminal does not reach it.
# Every exec in between keeps the pid.
spawn() {
    local server=$1
    shift
    setsid "$@" >>"$("${server}_log")" 2>&1 </dev/null 8>&- &
    echo $! >"$(pid_file "$server")"
}

# Starts it and waits until it is ready, has died, or two minutes (a crash recovery) have passed. We
# have just forked it, so the pid is its own; what it is called does not count yet: where the disk is
# slow, seconds pass before it has become the server.
start_and_wait() {
    local server=$1 deadline=$((SECONDS + 120)) log
    log=$("${server}_log")
    mkdir -p "$(dirname "$log")"
    [[ ! -f $log ]] || mv -f "$log" "$log.1"
    touch "$log"
    strictly "${server}_start" >>"$log" 2>&1 || return 1
    until "${server}_ready" 2>/dev/null; do
        ! ended "$(cat "$(pid_file "$server")" 2>/dev/null)" || return 1
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

# Runs one of our functions so that it stops at its first failing command. Where a caller tests the
# result bash switches `set -e` off, for all that is called from there; only a new process has it.
strictly() { "$here/stack" call "$@"; }

show_log() {
    local log
    log=$("${1}_log")
    echo "$1 did not start; the end of $log:" >&2
    tail -n 20 "$log" >&2
}

# stop_one VERB SERVER [--or-kill]; a server that does not stop in time is an error or, when asked
# for, killed.
stop_one() {
    local verb=$1 server=$2 pid began=$EPOCHREALTIME
    pid=$(pid_of "$server") || { say "$server" "-" "is not running" && return; }
    case $verb in
        stop) kill "-$("${server}_stop_signal")" "$pid" ;;
        stop-immediate) kill -QUIT "$pid" ;;
        kill) kill_tree "$pid" ;;
    esac
    if ! gone_within 30 "$pid"; then
        [[ ${3:-} == --or-kill ]] || fail "$server (pid $pid) did not stop within 30 s"
        echo "$server did not stop within 30 s: killed"
        kill_tree "$pid"
        gone_within 10 "$pid" || fail "$server (pid $pid) does not die"
    fi
    rm -f "$(pid_file "$server")"
    say "$server" "$(address "$server")" "$(past "$verb") in $(since "$began") s"
}

past() {
    case $1 in
        stop) echo stopped ;;
        stop-immediate) echo "stopped at once" ;;
        kill) echo killed ;;
    esac
}

gone_within() {
    local deadline=$((SECONDS + $1)) pid=$2
    until ended "$pid"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.05
    done
}

# Gone, or dead and only not yet waited for by its parent.
ended() { ! grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null; }

# The children too: Postgres has a process a session. The parent is held still meanwhile so that it
# makes no new ones.
kill_tree() {
    local children
    kill -STOP "$1"
    mapfile -t children < <(children_of "$1")
    kill -KILL "$1" "${children[@]}" 2>/dev/null || true
}

children_of() { awk -v parent="$1" '$1 == "Pid:" { pid = $2 } $1 == "PPid:" && $2 == parent { print pid }' /proc/[0-9]*/status 2>/dev/null || true; }
