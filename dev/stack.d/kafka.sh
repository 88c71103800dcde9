# Apache Kafka from its Maven coordinates: one KRaft node that is broker and controller.
# shellcheck shell=bash disable=SC2154 # $stack, $cache and $parts come from dev/stack

readonly kafka_version=4.3.1

kafka_packages() {
    command -v java >/dev/null || echo openjdk-17-jre-headless
    [[ -d $cache/kafka-$kafka_version ]] || maven_package
}

kafka_install() {
    artefact "kafka-$kafka_version" "Apache Kafka $kafka_version from Maven" kafka_fetch
    artefact "$(kafka_classes)" "Kafka's class-data archive" kafka_dump_classes
}

kafka_fetch() {
    cp "$parts/kafka-pom.xml" "$1/pom.xml"
    maven_copy "$1/jars" copy-dependencies -f "$1/pom.xml" "-Dkafka.version=$kafka_version" -DincludeScope=runtime
}

# The class-data archive makes a start quick; it fits one build of Java only.
kafka_classes() { echo "kafka-$kafka_version-classes-$(java -version 2>&1 | cksum | cut -d ' ' -f 1)"; }

# A short life of a broker, during which Java notes the classes that it loads.
kafka_dump_classes() {
    local home=$1/trial deadline=$((SECONDS + 60))
    mkdir "$home"
    kafka_format "$home" "$(free_port)" "$(free_port)"
    kafka_java_line quick "-XX:ArchiveClassesAtExit=$1/classes.jsa" kafka.Kafka "$home/server.properties"
    "${java_line[@]}" >"$home/log" 2>&1 &
    local pid=$!
    until kafka_started "$home/log"; do
        if ! kill -0 "$pid" || ((SECONDS >= deadline)); then
            kill -KILL "$pid"
            tail -n 20 "$home/log"
            return 1
        fi
        sleep 0.2
    done
    kill -TERM "$pid"
    wait "$pid" || true # 143, also when all went well
    test -s "$1/classes.jsa"
    rm -rf "$home"
}

kafka_start() {
    mkdir -p "$stack/kafka"
    kafka_format "$stack/kafka" "$(port_of kafka)" "$(port_of kafka_controller)"
    [[ -z ${FALAJ_STACK_KAFKA_PASSWORD:-} ]] || kafka_sasl_conf "$(port_of kafka_sasl)" >>"$stack/kafka/server.properties"
    kafka_java_line "${FALAJ_KAFKA_JVM:-quick}" "-XX:SharedArchiveFile=$cache/$(kafka_classes)/classes.jsa" \
        kafka.Kafka "$stack/kafka/server.properties"
    spawn kafka "${java_line[@]}"
}

kafka_more_ports() { echo kafka_controller ${FALAJ_STACK_KAFKA_PASSWORD:+kafka_sasl}; }

# kafka_format HOME PORT CONTROLLER_PORT: writes the configuration and, the first time, the metadata.
kafka_format() {
    kafka_conf "$@" >"$1/server.properties"
    [[ ! -f $1/data/meta.properties ]] || return 0
    kafka_java quick kafka.tools.StorageTool format --ignore-formatted -t "$(kafka_cluster_id)" -c "$1/server.properties"
}

kafka_conf() {
    cat <<CONF
# After a SIGKILL the controller lets the broker in again only when its last session has timed out.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$3
controller.listener.names=CONTROLLER
listeners=BROKER://127.0.0.1:$2,CONTROLLER://127.0.0.1:$3
advertised.listeners=BROKER://127.0.0.1:$2
inter.broker.listener.name=BROKER
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$1/data
auto.create.topics.enable=false
# A topic that is removed gives its memory and its disk back at once.
log.segment.delete.delay.ms=1000
# Two indexes a partition are mapped at their full size, 10 MB each by default.
log.index.size.max.bytes=1048576
num.partitions=4
min.insync.replicas=1
default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
CONF
}

# kafka_sasl_conf PORT: one more listener.
kafka_sasl_conf() {
    cat <<CONF
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT
listeners=BROKER://127.0.0.1:$(port_of kafka),CONTROLLER://127.0.0.1:$(port_of kafka_controller),SASL://127.0.0.1:$1
advertised.listeners=BROKER://127.0.0.1:$(port_of kafka),SASL://127.0.0.1:$1
listener.name.sasl.sasl.enabled.mechanisms=PLAIN
listener.name.sasl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_falaj="$FALAJ_STACK_KAFKA_PASSWORD";
CONF
}

# A UUID in URL-safe base64. It starts with a letter: a leading dash would look like an option.
kafka_cluster_id() { echo "f$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | cut -c 2-22)"; }

kafka_java() {
    kafka_java_line "$@"
    "${java_line[@]}"
}

# kafka_java_line quick|bench ARGUMENT…: sets java_line. The archive wants the same list of jars
# each time, in the same order.
kafka_java_line() {
    local jvm=(-Xms256m -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1) jars
    [[ $1 != bench ]] || jvm=(-Xms512m -Xmx512m -XX:+UseG1GC -XX:MaxGCPauseMillis=20
        # Its memory and its compilers are there from the start, so that the bench can see when it is warm.
        -XX:+AlwaysPreTouch -XX:-UseDynamicNumberOfCompilerThreads)
    shift
    jars=$(printf '%s:' "$cache/kafka-$kafka_version/jars"/*.jar)
    java_line=(java "${jvm[@]}" -Djava.awt.headless=true "-Dlog4j2.configurationFile=$parts/kafka-log4j2.xml"
        -cp "${jars%:}" "$@")
}

kafka_ready() { kafka_started "$(kafka_log)"; }

kafka_started() { grep -q 'Kafka Server started' "$1"; }

kafka_stop_signal() { echo TERM; }

kafka_log() { echo "$stack/kafka.log"; }

kafka_env() { export_line FALAJ_KAFKA__BOOTSTRAP_SERVERS "$(address kafka)"; }
