//! `falaj bookmark`: a copy of the slot as it stands, with the lookup rows as of there.
//!
//! A bookmark is a slot of its own, which nobody reads: Postgres keeps everything from its place on, until it is dropped.
//! `produce --from-bookmark` copies it again, so it can be replayed as often as wanted. Its lookup rows and its owner stand
//! in `state.dir/bookmarks/NAME`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use crate::check::postgres::{free_slot, identity};
use crate::cli;
use crate::enrich::copy_state;
use crate::enrich::state::{self, require_header};
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
/// Written before the slot is made, so that it is known whose it is, and again once the bookmark is whole.
const FILE: &str = "bookmark.json";
/// Longest name of a slot (NAMEDATALEN).
const LONGEST: usize = 63;

/// A bookmark, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bookmark {
    /// The pipeline whose slot was copied.
    pub pipeline: String,
    /// That slot.
    pub slot: String,
    /// Everything committed from here on comes again. While it is unfinished: its slot stands here or later.
    pub lsn: Lsn,
    /// The cluster and database that have its slots; absent in older files.
    #[serde(default)]
    home: Option<(String, String)>,
    /// Whether slot and lookup rows are there.
    #[serde(default = "yes")]
    finished: bool,
    /// Where it is stored.
    #[serde(skip)]
    dir: PathBuf,
}

fn yes() -> bool {
    true
}

impl Bookmark {
    /// Finds a bookmark by its name.
    ///
    /// # Errors
    /// [`Error::Refused`] when there is none, with those that there are.
    pub fn find(state: &Path, name: &str) -> Result<Self> {
        let dir = state.join(DIR).join(name);
        match read(&dir)?.filter(|bookmark| bookmark.finished) {
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
                make(world, &client, &conninfo, name).await
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

async fn make(world: &World, client: &Client, conninfo: &Conninfo, name: &str) -> Result<()> {
    let (state, slot) = (&world.config.state.dir, &world.config.postgres.slot);
    let dir = state.join(DIR).join(name);
    if pins::pinned(client, name).await?.is_some() {
        return Err(taken(name));
    }
    let found = slot::require(slot, slot::read(client, slot).await?, conninfo.dbname())?;
    free_slot(client, name).await?;
    let mut bookmark = Bookmark {
        pipeline: world.config.pipeline.clone(),
        slot: slot.clone(),
        lsn: found.confirmed_flush_lsn,
        home: Some((identity(conninfo, name).await?.system_id, conninfo.dbname().to_owned())),
        finished: false,
        dir,
    };
    begin(&bookmark, name)?;
    // Where the server has not answered, the slot may be there.
    match pins::copy(client, slot, name).await {
        Ok(lsn) => bookmark.lsn = lsn,
        Err(error) if error.is_transient() => return Err(error),
        Err(error) => {
            remove_directory(&bookmark.dir)?;
            return Err(error);
        }
    }
    // The slot first: what the state holds then reaches at least as far.
    if let Err(error) = store(state, &bookmark, name) {
        pins::drop_slot(client, name).await?;
        remove_directory(&bookmark.dir)?;
        return Err(error);
    }
    let pinned = pins::pinned(client, name).await?;
    print(&format!("{}falaj bookmark --drop {name} releases it\n", line(name, &bookmark, pinned.as_ref())))
}

fn taken(name: &str) -> Error {
    Error::refused(
        "bookmark",
        format!("there is a bookmark or a slot \"{name}\" already"),
        "a new name",
        format!("choose another name, or falaj bookmark --drop {name}"),
    )
}

/// Stores an unfinished bookmark; only one process can.
fn begin(bookmark: &Bookmark, name: &str) -> Result<()> {
    let (dir, path) = (&bookmark.dir, bookmark.dir.join(FILE));
    let tmp = dir.join(format!("begun.{}", std::process::id()));
    let written = (|| {
        fs::create_dir_all(dir)?;
        write(&tmp, bookmark)?;
        // Unlike a rename this takes no other's place.
        let linked = fs::hard_link(&tmp, &path);
        fs::remove_file(&tmp)?;
        linked?;
        fs::File::open(dir)?.sync_all()?;
        fs::File::open(dir.parent().unwrap_or(dir))?.sync_all()
    })();
    written.map_err(|e: std::io::Error| match e.kind() {
        std::io::ErrorKind::AlreadyExists => taken(name),
        _ => Error::fatal(format_args!("writing {}", path.display()), e),
    })
}

fn write(path: &Path, bookmark: &Bookmark) -> std::io::Result<()> {
    let file = fs::File::create(path)?;
    serde_json::to_writer(&file, bookmark)?;
    file.sync_all()
}

fn remove_directory(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).map_err(|e| Error::fatal(format_args!("removing {}", dir.display()), e))
}

fn store(state: &Path, bookmark: &Bookmark, name: &str) -> Result<()> {
    if require_header(state, &bookmark.slot)?.identity.slot != bookmark.slot {
        return Err(state::unknown(state, &bookmark.slot));
    }
    copy_state(state, bookmark.lsn, &bookmark.dir, name)?;
    let path = bookmark.dir.join(FILE);
    let written = (|| {
        let tmp = bookmark.dir.join("bookmark.tmp");
        write(&tmp, &Bookmark { finished: true, ..bookmark.clone() })?;
        fs::rename(&tmp, &path)?;
        fs::File::open(&bookmark.dir)?.sync_all()
    })();
    written.map_err(|e| Error::fatal(format_args!("writing {}", path.display()), e))
}

async fn list(world: &World, client: &Client) -> Result<()> {
    let all = all(&world.config.state.dir)?;
    if all.is_empty() {
        return print("no bookmark\n");
    }
    for (name, bookmark) in all {
        if !bookmark.finished {
            print(&format!("{name}  unfinished: falaj bookmark --drop {name} removes what there is of it\n"))?;
            continue;
        }
        print(&line(&name, &bookmark, pins::pinned(client, &name).await?.as_ref()))?;
        for copy in directories(bookmark.dir())? {
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
    let dir = state.join(DIR).join(name);
    let bookmark = match read(&dir)? {
        Some(bookmark) => bookmark,
        None => Bookmark::find(state, name)?,
    };
    if let Some((system, database)) = &bookmark.home {
        let here = (identity(conninfo, name).await?.system_id, conninfo.dbname());
        if (system, database.as_str()) != (&here.0, here.1) {
            return Err(Error::refused(
                "bookmark",
                format!(
                    "\"{name}\" is of database \"{database}\" of system {system}, this is \"{}\" of {}",
                    here.1, here.0
                ),
                "the database that has its slots",
                format!("connect to it; where it is gone for good, remove {}", dir.display()),
            ));
        }
    }
    // Nobody reads a bookmark's own slot, so that it stands where it was made. Its copies have been moved by their readers.
    let own = |at: Lsn| if bookmark.finished { at == bookmark.lsn } else { at >= bookmark.lsn };
    let copies = directories(&dir)?.into_iter().map(|copy| (copy, false));
    for (slot, is_own) in copies.chain([(name.to_owned(), true)]) {
        let Some(found) = slot::read(client, &slot).await? else { continue };
        let ours = found.plugin.as_deref() == Some("pgoutput") && found.database.as_deref() == Some(conninfo.dbname());
        if ours && (!is_own || own(found.confirmed_flush_lsn)) {
            pins::drop_slot(client, &slot).await?;
        } else {
            let at = found.confirmed_flush_lsn;
            print(&format!("slot {slot} is another one by now (plugin {:?}, at {at}): it is left\n", found.plugin))?;
        }
    }
    remove_directory(&dir)?;
    print(&format!("{name} is dropped, and with it what it pinned\n"))
}

fn names(state: &Path) -> Result<Vec<String>> {
    Ok(all(state)?.into_iter().filter(|(_, bookmark)| bookmark.finished).map(|(name, _)| name).collect())
}

fn all(state: &Path) -> Result<Vec<(String, Bookmark)>> {
    let dir = state.join(DIR);
    let mut all = Vec::new();
    for name in directories(&dir)? {
        all.extend(read(&dir.join(&name))?.map(|bookmark| (name, bookmark)));
    }
    Ok(all)
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
