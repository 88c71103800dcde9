//! `falaj bookmark`: a copy of the slot as it stands, with the lookup rows as of there.
//!
//! A bookmark is a slot of its own, which nobody reads: Postgres keeps everything from its place on, until it is dropped.
//! `produce --from-bookmark` copies it again, so it can be replayed as often as wanted. Its lookup rows and its owner stand
//! in `state.dir/bookmarks/NAME`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;
use tracing::warn;

use crate::check::postgres::{free_slot, identity, unknown_state};
use crate::cli;
use crate::enrich::copy_state;
use crate::enrich::state::require_header;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::source::conn::Conninfo;
use crate::source::pins::{self, Pinned};
use crate::source::slot;
use crate::upload::record::hash;
use crate::world::{World, print};

const APPLICATION: &str = "falaj bookmark";
/// Directory of the bookmarks, in that of the lookup state.
const DIR: &str = "bookmarks";
/// Written last: with it the bookmark is whole.
const FILE: &str = "bookmark.json";
/// Written first: from here on there may be a slot of this name, and it is ours.
const BEGUN: &str = "begun";
/// Longest name of a slot (NAMEDATALEN).
const LONGEST: usize = 63;

/// A bookmark, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bookmark {
    /// The pipeline whose slot was copied.
    pub pipeline: String,
    /// That slot.
    pub slot: String,
    /// Everything committed from here on comes again.
    pub lsn: Lsn,
    /// Where it is stored.
    #[serde(skip)]
    dir: PathBuf,
}

impl Bookmark {
    /// Finds a bookmark by its name.
    ///
    /// # Errors
    /// [`Error::Refused`] when there is none, with those that there are.
    pub fn find(state: &Path, name: &str) -> Result<Self> {
        let dir = state.join(DIR).join(name);
        match read(&dir)? {
            Some(bookmark) => Ok(bookmark),
            None => {
                let known = names(state)?;
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                Err(Error::refused(
                    "bookmark",
                    format!("no bookmark \"{name}\" in {}; there is {known}", state.join(DIR).display()),
                    "a bookmark, in the state.dir of the pipeline that made it",
                    "falaj bookmark NAME makes one; FALAJ_STATE__DIR names the directory",
                ))
            }
        }
    }

    /// Where its lookup rows are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The slot that a pipeline streams from when it replays a bookmark.
pub fn replay_slot(bookmark: &str, pipeline: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    let name = format!("{bookmark}_{}", pipeline.chars().map(plain).collect::<String>());
    // Two pipelines of nearly the same name, or a long one, must not share a slot.
    if name.len() <= LONGEST && name == format!("{bookmark}_{pipeline}") {
        return name;
    }
    let short: String = name.chars().take(LONGEST - 9).collect();
    format!("{short}_{}", &hash(pipeline)[..8])
}

/// Runs the verb.
///
/// # Errors
/// [`Error::Usage`] for a name that no slot can have; [`Error::Refused`] for one that is taken or absent, for a slot in use,
/// or for want of rights; [`Error::Unreachable`] without Postgres.
pub async fn run(world: &World, args: &cli::Bookmark) -> Result<()> {
    let conninfo = Conninfo::parse(&world.config.postgres.url)?;
    let client = world.at_start("postgres", || conninfo.sql(APPLICATION)).await?;
    match args.name.as_deref() {
        None => list(world, &client).await,
        Some(name) => {
            require_name(name)?;
            if args.drop {
                remove(world, &client, &conninfo, name).await
            } else {
                make(world, &client, conninfo.dbname(), name).await
            }
        }
    }
}

fn require_name(name: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if (1..=LONGEST).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(Error::Usage(format!("bookmark {name:?}: a slot's name has 1 to {LONGEST} of a–z, 0–9 and _")))
}

async fn make(world: &World, client: &Client, database: &str, name: &str) -> Result<()> {
    let config = &world.config;
    let dir = config.state.dir.join(DIR).join(name);
    if read(&dir)?.is_some() || dir.join(BEGUN).exists() || pins::pinned(client, name).await?.is_some() {
        return Err(Error::refused(
            "bookmark",
            format!("there is a bookmark or a slot \"{name}\" already"),
            "a new name",
            format!("choose another name, or falaj bookmark --drop {name}"),
        ));
    }
    slot::require(&config.postgres.slot, slot::read(client, &config.postgres.slot).await?, database)?;
    free_slot(client, name).await?;
    begin(&dir)?;
    let lsn = match pins::copy(client, &config.postgres.slot, name).await {
        Ok(lsn) => lsn,
        // The server has answered no. Where it has not answered, the slot may be there.
        Err(error) if !error.is_transient() => {
            remove_directory(&dir)?;
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    let bookmark = Bookmark { pipeline: config.pipeline.clone(), slot: config.postgres.slot.clone(), lsn, dir };
    // The slot first: what the state holds then reaches at least as far.
    if let Err(error) = store(&config.state.dir, &bookmark, name) {
        pins::drop_slot(client, name).await?;
        remove_directory(&bookmark.dir)?;
        return Err(error);
    }
    let pinned = pins::pinned(client, name).await?;
    print(&format!("{}falaj bookmark --drop {name} releases it\n", line(name, &bookmark, pinned.as_ref())))
}

/// Notes durably that a slot is about to be made, so that it is known whose it is when this process is killed.
fn begin(dir: &Path) -> Result<()> {
    let written = (|| {
        fs::create_dir_all(dir)?;
        fs::File::create(dir.join(BEGUN))?.sync_all()?;
        fs::File::open(dir)?.sync_all()?;
        fs::File::open(dir.parent().unwrap_or(dir))?.sync_all()
    })();
    written.map_err(|e| Error::fatal(format_args!("writing {}", dir.display()), e))
}

fn remove_directory(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).map_err(|e| Error::fatal(format_args!("removing {}", dir.display()), e))
}

fn store(state: &Path, bookmark: &Bookmark, name: &str) -> Result<()> {
    if require_header(state)?.identity.slot != bookmark.slot {
        return Err(unknown_state(state, &bookmark.slot));
    }
    copy_state(state, bookmark.lsn, &bookmark.dir, name)?;
    let path = bookmark.dir.join(FILE);
    let written = (|| {
        let tmp = bookmark.dir.join("bookmark.tmp");
        let file = fs::File::create(&tmp)?;
        serde_json::to_writer(&file, bookmark)?;
        file.sync_all()?;
        fs::rename(&tmp, &path)?;
        fs::File::open(&bookmark.dir)?.sync_all()
    })();
    written.map_err(|e| Error::fatal(format_args!("writing {}", path.display()), e))
}

async fn list(world: &World, client: &Client) -> Result<()> {
    let names = names(&world.config.state.dir)?;
    let begun = begun(&world.config.state.dir)?;
    if names.is_empty() && begun.is_empty() {
        return print("no bookmark\n");
    }
    for name in begun {
        print(&format!("{name}  unfinished: falaj bookmark --drop {name} removes what there is of it\n"))?;
    }
    for name in names {
        let bookmark = Bookmark::find(&world.config.state.dir, &name)?;
        print(&line(&name, &bookmark, pins::pinned(client, &name).await?.as_ref()))?;
        for copy in copies(&bookmark)? {
            let pinned = pins::pinned(client, &copy).await?;
            print(&format!("  replayed through slot {copy}: {}\n", pins(pinned.as_ref())))?;
        }
    }
    Ok(())
}

fn line(name: &str, bookmark: &Bookmark, pinned: Option<&Pinned>) -> String {
    let Bookmark { pipeline, slot, lsn, .. } = bookmark;
    format!("{name}  at {lsn}, of slot \"{slot}\" (pipeline \"{pipeline}\"): {}\n", pins(pinned))
}

fn pins(pinned: Option<&Pinned>) -> String {
    match pinned {
        None => "its slot is gone".to_owned(),
        Some(Pinned { restart_lsn: None, .. }) => "lost: Postgres has removed its WAL".to_owned(),
        Some(Pinned { restart_lsn: Some(lsn), wal_bytes, catalog_age }) => format!(
            "pins {wal_bytes} bytes of WAL (from {lsn} on), and the catalogue rows of the last {catalog_age} transactions"
        ),
    }
}

/// The slots go first: while one of them is in use, everything stays.
async fn remove(world: &World, client: &Client, conninfo: &Conninfo, name: &str) -> Result<()> {
    let state = &world.config.state.dir;
    if begun(state)?.iter().any(|begun| begun == name) {
        pins::drop_slot(client, name).await?;
        remove_directory(&state.join(DIR).join(name))?;
        return print(&format!("{name}, which was never finished, is removed\n"));
    }
    let bookmark = Bookmark::find(state, name)?;
    let server = identity(conninfo, name).await?;
    let made_on = require_header(bookmark.dir())?.identity;
    if made_on.system_id != server.system_id {
        return Err(Error::refused(
            "bookmark",
            format!("\"{name}\" was made on system {}, this server is {}", made_on.system_id, server.system_id),
            "the server that has its slots",
            format!("connect to it, or remove {}", bookmark.dir().display()),
        ));
    }
    let mut slots = copies(&bookmark)?;
    match slot::read(client, name).await? {
        // Nobody reads a bookmark's own slot, so that it stands where it was made.
        Some(found) if found.confirmed_flush_lsn != bookmark.lsn => {
            warn!(
                "slot \"{name}\" stands at {}, the bookmark's at {}: it is left",
                found.confirmed_flush_lsn, bookmark.lsn
            );
        }
        _ => slots.push(name.to_owned()),
    }
    for slot in &slots {
        pins::drop_slot(client, slot).await?;
    }
    remove_directory(bookmark.dir())?;
    print(&format!("{name} is dropped, and with it what it pinned\n"))
}

/// Slots that were copied from a bookmark for a replay; each has a directory in it.
fn copies(bookmark: &Bookmark) -> Result<Vec<String>> {
    directories(bookmark.dir())
}

fn names(state: &Path) -> Result<Vec<String>> {
    let dir = state.join(DIR);
    let mut names = Vec::new();
    for name in directories(&dir)? {
        if read(&dir.join(&name))?.is_some() {
            names.push(name);
        }
    }
    Ok(names)
}

/// Those of which a killed process may have left a slot.
fn begun(state: &Path) -> Result<Vec<String>> {
    let dir = state.join(DIR);
    let unfinished = |name: &String| dir.join(name).join(BEGUN).exists() && !dir.join(name).join(FILE).exists();
    Ok(directories(&dir)?.into_iter().filter(unfinished).collect())
}

fn directories(dir: &Path) -> Result<Vec<String>> {
    let failed = |e: std::io::Error| Error::fatal(format_args!("reading {}", dir.display()), e);
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.path().is_dir() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    Ok(names)
}

fn read(dir: &Path) -> Result<Option<Bookmark>> {
    let path = dir.join(FILE);
    let failed = |e: &dyn std::fmt::Display| Error::fatal(format_args!("reading {}", path.display()), e);
    match fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed(&e)),
        Ok(text) => {
            let bookmark: Bookmark = serde_json::from_slice(&text).map_err(|e| failed(&e))?;
            Ok(Some(Bookmark { dir: dir.to_owned(), ..bookmark }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_several_pipelines_stay_apart() {
        assert_eq!(replay_slot("mark", "again"), "mark_again");
        let (a, b) = (replay_slot("mark", "a.b"), replay_slot("mark", "a-b"));
        assert!(a != b && a.starts_with("mark_a_b_"), "{a} {b}");
        let long = replay_slot("mark", &"x".repeat(100));
        assert!(long.len() == LONGEST && require_name(&long).is_ok(), "{long}");
    }

    #[test]
    fn a_name_that_no_slot_can_have_is_refused() {
        for bad in ["", "A", "a-b", "../x", &"x".repeat(64)] {
            assert_eq!(require_name(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
