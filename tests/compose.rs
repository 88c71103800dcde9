//! docker-compose.yml, docker/, dev/, the configuration and the documentation say the same. No server is needed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Parser;
use falaj::cli::Cli;
use falaj::config::{Config, DEFAULTS};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn compose() -> String {
    read("docker-compose.yml")
}

/// `${NAME:-default}` as Compose fills it in where NAME is unset.
fn filled_in(value: &str) -> String {
    let mut out = String::new();
    let mut rest = value;
    while let Some((before, after)) = rest.split_once("${") {
        let (variable, tail) = after.split_once('}').unwrap_or_else(|| panic!("no end of ${{ in {value}"));
        out += before;
        out += variable.split_once(":-").unwrap_or_else(|| panic!("no default in {value}")).1;
        rest = tail;
    }
    out + rest
}

/// Every `FALAJ_SECTION__KEY: value` of the compose file.
fn falaj_variables(text: &str) -> Vec<(String, String)> {
    let pairs = text.lines().filter_map(|line| line.trim().split_once(": "));
    let ours = pairs.filter(|(name, _)| name.starts_with("FALAJ_") && name.contains("__"));
    ours.map(|(name, value)| (name.to_owned(), filled_in(value))).collect()
}

/// The strings of a one-line list: `key: ["a", "b"]`.
fn list<'a>(line: &'a str, key: &str) -> Option<Vec<&'a str>> {
    let inside = line.trim().strip_prefix(key)?.trim().strip_prefix('[')?.strip_suffix(']')?;
    Some(inside.split(',').map(|item| item.trim().trim_matches('"')).collect())
}

fn published() -> Vec<String> {
    compose().lines().filter_map(|line| list(line, "ports:")).flatten().map(str::to_owned).collect()
}

/// The port in `127.0.0.1:PORT…` of an address or URL.
fn port(address: &str) -> u16 {
    let after = address.rsplit_once("127.0.0.1:").unwrap_or_else(|| panic!("no 127.0.0.1 in {address}")).1;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|e| panic!("{address}: {e}"))
}

#[test]
fn every_falaj_variable_is_one_that_the_configuration_takes() {
    let variables = falaj_variables(&compose());
    assert!(variables.len() > 8, "{variables:?}");
    for variable in variables {
        Config::load(None, [variable.clone()]).unwrap_or_else(|e| panic!("{variable:?}: {e}"));
    }
}

#[test]
fn every_command_of_a_role_is_one_that_the_binary_takes() {
    let text = compose();
    let (_, services) = text.split_once("\nservices:\n").unwrap();
    let roles: Vec<&str> = services.split("\n\n").filter(|service| service.contains("<<: *falaj\n")).collect();
    let mut verbs = Vec::new();
    for role in &roles {
        let command =
            role.lines().find_map(|line| list(line, "command:")).unwrap_or_else(|| panic!("no command: {role}"));
        verbs.push(command[0].to_owned());
        assert!(role.trim_start().starts_with(&format!("{}:", command[0])), "named after its verb: {role}");
        Cli::try_parse_from(std::iter::once("falaj").chain(command)).unwrap_or_else(|e| panic!("{e}"));
    }
    assert_eq!(verbs, ["init", "generate", "produce", "consume", "upload", "mock-external"]);
}

#[test]
fn each_image_is_built_by_one_service_and_the_others_pull_none() {
    let text = compose();
    let (shared, services) = text.split_once("\nservices:\n").unwrap();
    assert!(shared.contains("  pull_policy: never\n") && !shared.contains("build:"), "{shared}");
    let files: Vec<&str> = services.lines().filter_map(|line| line.trim().strip_prefix("dockerfile: ")).collect();
    assert_eq!(files, ["bigquery.Dockerfile", "docker/Dockerfile"]);
}

#[test]
fn only_the_loopback_is_published_and_on_the_ports_of_the_defaults() {
    let published = published();
    for address in &published {
        assert!(address.starts_with("127.0.0.1:"), "{address}");
    }
    let published: BTreeSet<u16> = published.iter().map(|address| port(address)).collect();
    let defaults = Config::defaults().unwrap();
    let bigquery = DEFAULTS.lines().find(|line| line.contains("endpoint = ")).unwrap();
    let wanted = [
        port(&defaults.postgres.url.replace("postgres@", "")),
        port(defaults.kafka.servers()),
        port(&defaults.redis.url),
        port(&defaults.external.url),
        port(&defaults.http.listen),
        port(bigquery),
    ];
    for port in wanted {
        assert!(published.contains(&port), "{port} is a default and is not published: {published:?}");
    }
    let more: Vec<u16> = published.into_iter().filter(|port| !wanted.contains(port)).collect();
    assert_eq!(more, [9465, 9466], "the listeners of consume and upload");
}

#[test]
fn all_of_sql_is_mounted_in_its_order() {
    let mut files: Vec<String> = std::fs::read_dir(root().join("sql"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let text = compose();
    let mounted: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- ./sql/"))
        .map(|line| line.split(':').next().unwrap())
        .collect();
    assert_eq!(mounted, files);
}

#[test]
fn the_image_is_built_with_the_toolchain_and_targets_of_the_package() {
    let dockerfile = read("docker/Dockerfile");
    let toolchain: toml::Table = read("rust-toolchain.toml").parse().unwrap();
    let channel = toolchain["toolchain"]["channel"].as_str().unwrap();
    assert!(dockerfile.contains(&format!("FROM rust:{channel}-")));
    assert!(dockerfile.contains(&format!("RUSTUP_TOOLCHAIN={channel}")));
    // cargo refuses a manifest that names a file which is not there.
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    for kind in ["test", "bench", "example"] {
        for target in manifest.get(kind).and_then(toml::Value::as_array).into_iter().flatten() {
            let name = target["name"].as_str().unwrap();
            let default = format!("{kind}{}/{name}.rs", if kind == "bench" { "es" } else { "s" });
            let path = target.get("path").and_then(toml::Value::as_str).unwrap_or(&default);
            assert!(dockerfile.contains(path), "docker/Dockerfile does not copy {path}");
            assert!(read(".dockerignore").contains(&format!("!{path}")), ".dockerignore hides {path}");
        }
    }
}

#[test]
fn the_servers_are_of_the_versions_that_the_tests_run_against() {
    let version = |text: &str, before: &str| -> String {
        let after = text.split_once(before).unwrap_or_else(|| panic!("no {before}")).1;
        after.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect()
    };
    let (bigquery, image) = (read("dev/stack.d/bigquery.sh"), read("docker/bigquery.Dockerfile"));
    assert_eq!(version(&image, "local-bigquery=="), version(&bigquery, "bigquery_version="));
    assert_eq!(version(&image, "duckdb=="), version(&bigquery, "duckdb_version="));
    assert_eq!(version(&compose(), "apache/kafka:"), version(&read("dev/stack.d/kafka.sh"), "kafka_version="));
    assert_eq!(version(&compose(), "image: postgres:"), version(&read("dev/stack.d/postgres.sh"), "debian_major="));
}

/// README.md, CHANGELOG.md and all of docs/.
fn documents() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = ["README.md", "CHANGELOG.md"].iter().map(|name| root().join(name)).collect();
    let mut directories = vec![root().join("docs")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { found.push(path) }
        }
    }
    found.retain(|path| path.extension().is_some_and(|e| e == "md") && path.exists());
    found
}

#[test]
fn every_variable_that_the_documentation_names_exists() {
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        let words = text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
        for name in words.filter(|word| word.starts_with("FALAJ_") && word.contains("__")) {
            // The scheme itself, and a librdkafka key, whose names are not ours.
            if name == "FALAJ_SECTION__KEY" || name.starts_with("FALAJ_KAFKA__") {
                continue;
            }
            assert!(is_a_key(name), "{} names {name}", document.display());
        }
    }
}

/// Whether some value is taken for it.
fn is_a_key(name: &str) -> bool {
    let samples = ["1", "1s", "1MiB", "true", "kafka", "text"];
    samples.iter().any(|value| Config::load(None, [(name.to_owned(), (*value).to_owned())]).is_ok())
}

#[test]
fn a_name_that_is_no_key_would_be_seen() {
    assert!(is_a_key("FALAJ_BIGQUERY__PROJECT") && is_a_key("FALAJ_ARCHIVE__SEAL_AFTER"));
    assert!(!is_a_key("FALAJ_ARCHIVE__SEAL_AFTERR") && !is_a_key("FALAJ_NOWHERE__KEY"));
}
