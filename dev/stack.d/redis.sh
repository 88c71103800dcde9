# Redis: Debian's.
# shellcheck shell=bash disable=SC2154 # $stack comes from dev/stack

redis_packages() { command -v redis-server >/dev/null || echo redis-server; }

redis_install() { :; }

redis_start() {
    mkdir -p "$stack/redis/data"
    redis_conf >"$stack/redis/redis.conf"
    spawn redis redis-server "$stack/redis/redis.conf"
}

# set-proc-title: the command line stays as we gave it, which is how pid_of knows the server.
redis_conf() {
    cat <<CONF
bind 127.0.0.1
port $(port_of redis)
protected-mode yes
dir "$stack/redis/data"
appendonly yes
save ""
maxmemory-policy noeviction
set-proc-title no
CONF
}

redis_ready() {
    exec 3<>"/dev/tcp/127.0.0.1/$(port_of redis)" || return 1
    local answer
    printf 'PING\r\n' >&3
    read -r -t 2 answer <&3 || true
    exec 3>&-
    [[ $answer == +PONG* ]]
}

redis_stop_signal() { echo TERM; }

redis_log() { echo "$stack/redis.log"; }

redis_env() { export_line FALAJ_REDIS__URL "redis://$(address redis)/0"; }
