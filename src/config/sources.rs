//! Where events come from: each source has a topic and file names of its own, or is refused.

use super::Config;
use crate::archive;
use crate::error::{Error, Result};
use crate::message;

/// Kafka's limit of a topic's name, in bytes.
const LONGEST_TOPIC: usize = 249;
/// That of a file system, less what a part's number takes.
const LONGEST_FILE: usize = 245;

impl Config {
    /// The tables that events come from, whose topics are needed: the published ones, and that of messages where they are on.
    ///
    /// # Errors
    /// [`Error::Refused`] for a table of the messages' name, one whose topic is falaj's own, and a name that is too long.
    pub fn sources(&self, mut published: Vec<String>) -> Result<Vec<String>> {
        let own = [self.checkpoint_topic(), self.dead_letter_topic()];
        if let Some(table) = published.iter().find(|table| own.contains(&self.topic(table))) {
            return Err(Error::refused(
                "table_names",
                format!("table {table} would share topic {} with falaj's own records", self.topic(table)),
                "a topic of its own for each table",
                "kafka.topic = \"{pipeline}.table.{table}\", or take the table out of the publication",
            ));
        }
        let is_long = |table: &&String| {
            self.topic(table).len() > LONGEST_TOPIC || archive::file_name(table, 0).len() > LONGEST_FILE
        };
        if let Some(table) = published.iter().find(is_long) {
            return Err(Error::refused(
                "table_names",
                format!("table {table} has a name that is too long once it is encoded: topic {}", self.topic(table)),
                format!("at most {LONGEST_TOPIC} bytes as a topic, {LONGEST_FILE} as a file"),
                "rename the table or its schema, shorten kafka.topic, or take it out of the publication",
            ));
        }
        if self.produce.messages {
            let messages = message::TABLE.to_owned();
            if published.contains(&messages) {
                return Err(message::name_taken());
            }
            published.push(messages);
        }
        Ok(published)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_whose_names_lead_to_no_topic_of_their_own_are_refused() {
        let config = Config::load(None, [("FALAJ_PRODUCE__MESSAGES".to_owned(), "true".to_owned())]).unwrap();
        let sources = |table: &str| config.sources(vec![table.to_owned()]);
        assert_eq!(sources("t").unwrap(), ["t", "_message"]);
        let long = format!("{}.{}", "🎧".repeat(15), "n".repeat(63));
        for table in ["checkpoint", "dead_letter", "_message", &long] {
            assert_eq!(sources(table).unwrap_err().exit_code(), 78, "{table}");
        }
    }
}
