# Debezium's Postgres connector on Kafka Connect, both from Maven: at-least-once in a standalone worker, exactly-once in a
# distributed one, which alone can do it.
# shellcheck shell=bash disable=SC2154 # $here, $parts and $cache come from peer

readonly debezium_version=3.7.0.Final connect_version=4.3.1
readonly debezium_home=$cache/debezium-$debezium_version-connect-$connect_version

debezium_packages() {
    command -v java >/dev/null || echo openjdk-17-jre-headless
    command -v curl >/dev/null || echo curl
    [[ -d $debezium_home ]] || maven_package
}

debezium_install() {
    artefact "$(basename "$debezium_home")" "Debezium $debezium_version and Kafka Connect from Maven" debezium_fetch
}

debezium_fetch() {
    debezium_copy "$1" connect org.apache.kafka connect-runtime "$connect_version"
    # What the worker has itself must not be in the plugin's directory a second time.
    debezium_copy "$1" plugins/debezium io.debezium debezium-connector-postgres "$debezium_version" \
        -DexcludeGroupIds=org.apache.kafka,org.slf4j,org.apache.logging.log4j
}

# debezium_copy HOME DIRECTORY GROUP ARTIFACT VERSION PARAMETER…
debezium_copy() {
    local to=$1/$2 wanted=("-Dwanted.group=$3" "-Dwanted.artifact=$4" "-Dwanted.version=$5")
    cp "$here/maven-pom.xml" "$1/pom.xml"
    maven_copy "$to" copy-dependencies -f "$1/pom.xml" "${wanted[@]}" -DincludeScope=runtime "${@:6}"
}

# debezium_run PEER DIR SLOT TOPIC
debezium_run() {
    local port main=ConnectStandalone files=(worker.properties connector.properties)
    cd "$2" || exit
    port=$(debezium_port)
    debezium_worker "$1" "$port" "$3" >worker.properties
    debezium_connector "$3" "${4%.public.*}" >connector.properties
    if [[ $1 == *exactly-once ]]; then
        main=ConnectDistributed files=(worker.properties)
        echo exactly.once.support=required >>connector.properties
        debezium_submit "$port" &
    fi
    [[ ${PEER_FOR:-} != latency ]] || debezium_for_latency
    # The heap is what Connect's own start script gives it.
    exec setpriv --pdeathsig TERM java -Xms256m -Xmx2g -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -Djava.awt.headless=true \
        "-Dlog4j2.configurationFile=$parts/kafka-log4j2.xml" -cp "$debezium_home/connect/*" \
        "org.apache.kafka.connect.cli.$main" "${files[@]}"
}

# Nothing waits for a batch, and each row brings the time of its commit. Of two lines with one key the later one counts.
debezium_for_latency() {
    echo producer.linger.ms=0 >>worker.properties
    echo transforms.unwrap.add.fields=source.ts_us >>connector.properties
}

# Below the range that the kernel gives to outgoing connections.
debezium_port() {
    local port=$((20000 + RANDOM % 12000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

# debezium_worker PEER PORT SLOT
debezium_worker() {
    cat <<CONF
bootstrap.servers=$FALAJ_KAFKA__BOOTSTRAP_SERVERS
listeners=http://127.0.0.1:$2
plugin.path=$debezium_home/plugins
plugin.discovery=SERVICE_LOAD
key.converter=org.apache.kafka.connect.json.JsonConverter
key.converter.schemas.enable=false
value.converter=org.apache.kafka.connect.json.JsonConverter
value.converter.schemas.enable=false
topic.creation.enable=false
producer.linger.ms=20
producer.batch.size=262144
producer.buffer.memory=67108864
producer.compression.type=lz4
CONF
    if [[ $1 == *exactly-once ]]; then
        cat <<CONF
group.id=$3
exactly.once.source.support=enabled
config.storage.topic=$3.config
config.storage.replication.factor=1
offset.storage.topic=$3.offsets
offset.storage.replication.factor=1
offset.storage.partitions=1
status.storage.topic=$3.status
status.storage.replication.factor=1
status.storage.partitions=1
CONF
    else
        echo offset.storage.file.filename=offsets
    fi
}

# debezium_connector SLOT PREFIX; the fastest settings that were found.
debezium_connector() {
    local url=${FALAJ_POSTGRES__URL#*://} user=postgres place
    [[ $url != *@* ]] || user=${url%%@*}
    url=${url#*@}
    place=${url%%/*}
    cat <<CONF
name=bench
connector.class=io.debezium.connector.postgresql.PostgresConnector
tasks.max=1
database.hostname=${place%%:*}
database.port=${place##*:}
database.user=$user
database.dbname=${url#*/}
plugin.name=pgoutput
slot.name=$1
slot.drop.on.stop=false
publication.name=falaj
publication.autocreate.mode=disabled
snapshot.mode=no_data
table.include.list=public.engagement_events
topic.prefix=$2
max.batch.size=8192
max.queue.size=32768
poll.interval.ms=10
tombstones.on.delete=false
advanced.metrics.enable=false
# Else a pg_logical_emit_message() of any prefix is an event for a topic that does not exist, and holds up what follows.
message.prefix.exclude.list=.*
transforms=unwrap
transforms.unwrap.type=io.debezium.transforms.ExtractNewRecordState
CONF
}

# A distributed worker is given its connector by HTTP, as soon as it listens. It ends with the worker.
debezium_submit() {
    local body worker=$$ deadline=$((SECONDS + 90))
    body=$(sed '/^#/d; s/\([^=]*\)=\(.*\)/"\1": "\2"/' connector.properties | paste -sd ,)
    until curl -sf -o submit.answer -X PUT -H 'Content-Type: application/json' -d "{$body}" \
        "http://127.0.0.1:$1/connectors/bench/config"; do
        ((SECONDS < deadline)) && kill -0 "$worker" 2>/dev/null || return 1
        sleep 0.3
    done
}
