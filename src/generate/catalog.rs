//! The contents that events are about: their rows, their titles, and how often each is chosen.

use rand::Rng;
use rand::rngs::StdRng;
use uuid::Uuid;

use super::hash;

/// One row of `content`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Primary key.
    pub id: Uuid,
    /// Unique.
    pub slug: String,
    /// Arabic and other scripts included.
    pub title: String,
    /// `None` is legal.
    pub kind: Option<Kind>,
    /// `None` for newsletters; 0 is legal.
    pub length_seconds: Option<i32>,
    /// Microseconds after the start of the load; negative for what was there before.
    pub published: i64,
}

/// `content_type`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 1200 to 7200 seconds.
    Podcast,
    /// Has no length.
    Newsletter,
    /// 300 to 3600 seconds.
    Video,
}

impl Kind {
    /// As the column holds it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Podcast => "podcast",
            Self::Newsletter => "newsletter",
            Self::Video => "video",
        }
    }

    /// Reads the column; another text is `None`.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Podcast, Self::Newsletter, Self::Video].into_iter().find(|kind| kind.as_str() == text)
    }
}

/// What of a content decides about its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Primary key.
    pub id: Uuid,
    /// Newsletters are clicked more than played.
    pub kind: Option<Kind>,
    /// Bounds the durations.
    pub length_seconds: Option<i32>,
}

impl From<&Content> for Subject {
    fn from(content: &Content) -> Self {
        Self { id: content.id, kind: content.kind, length_seconds: content.length_seconds }
    }
}

/// Popularity falls to half with this many newer contents.
const HALF_LIFE: f64 = 60.0;
/// Old contents keep this much of their popularity.
const EVERGREEN: f64 = 0.05;

/// Chooses contents by Zipf's law (s = 1) with recency decay.
///
/// A content's Zipf rank is drawn from the seed; recency counts newer contents and not days, so that the choice does not
/// depend on the day of the run.
#[derive(Debug)]
pub struct Catalog {
    /// Oldest first.
    subjects: Vec<Subject>,
    /// Zipf weights, in the same order.
    zipf: Vec<f64>,
    /// Running sums of the decayed weights.
    sums: Vec<f64>,
}

impl Catalog {
    /// A catalogue of these contents, oldest first.
    pub fn new(subjects: Vec<Subject>, rng: &mut StdRng) -> Self {
        let mut catalog = Self { subjects: Vec::new(), zipf: Vec::new(), sums: Vec::new() };
        for subject in subjects {
            catalog.push(subject, rng);
        }
        catalog.weigh();
        catalog
    }

    /// Adds the newest content.
    pub fn add(&mut self, subject: Subject, rng: &mut StdRng) {
        self.push(subject, rng);
        self.weigh();
    }

    /// The index of a content, by popularity; `None` from an empty catalogue.
    pub fn choose(&self, rng: &mut StdRng) -> Option<u32> {
        let point = rng.random::<f64>() * self.sums.last()?;
        let index = self.sums.partition_point(|sum| *sum <= point);
        Some(index.min(self.subjects.len() - 1) as u32)
    }

    /// The content with that index; an index stays valid while contents are added.
    pub fn subject(&self, index: u32) -> Option<Subject> {
        self.subjects.get(index as usize).copied()
    }

    /// One content, all equally likely; `None` from an empty catalogue.
    pub fn any(&self, rng: &mut StdRng) -> Option<Subject> {
        if self.subjects.is_empty() {
            None
        } else {
            self.subjects.get(rng.random_range(0..self.subjects.len())).copied()
        }
    }

    /// Inserts its rank into the permutation of Zipf ranks: the `n`th content gets a rank out of 1..=n.
    fn push(&mut self, subject: Subject, rng: &mut StdRng) {
        self.subjects.push(subject);
        let rank = rng.random_range(1..=self.subjects.len());
        self.zipf.push(1.0 / rank as f64);
    }

    fn weigh(&mut self) {
        let newest = self.zipf.len();
        let mut sum = 0.0;
        self.sums.clear();
        for (index, zipf) in self.zipf.iter().enumerate() {
            let newer = (newest - 1 - index) as f64;
            sum += zipf * (EVERGREEN + (1.0 - EVERGREEN) * 0.5_f64.powf(newer / HALF_LIFE));
            self.sums.push(sum);
        }
    }
}

const DAY: i64 = 86_400_000_000;

/// The `n`th content of a seed, published `n` hours apart before the start for the first `stock` ones.
pub fn content(seed: u64, n: u64, stock: u64, rng: &mut StdRng) -> Content {
    let kind = match rng.random_range(0..100) {
        0..50 => Kind::Podcast,
        50..75 => Kind::Newsletter,
        _ => Kind::Video,
    };
    let id = hash::uuid(seed, hash::CONTENT, n);
    Content {
        id,
        slug: format!("{}-{n}-{}", kind.as_str(), &id.simple().to_string()[..8]),
        title: title(rng, n),
        kind: Some(kind),
        length_seconds: length(kind, rng),
        published: (n as i64 - stock as i64) * (DAY / 8),
    }
}

/// A length as the kind has it; two in a hundred are 0, as when the length is not measured yet.
pub fn length(kind: Kind, rng: &mut StdRng) -> Option<i32> {
    if kind == Kind::Newsletter {
        return None;
    }
    if rng.random_bool(0.02) {
        return Some(0);
    }
    Some(match kind {
        Kind::Podcast => rng.random_range(1200..=7200),
        _ => rng.random_range(300..=3600),
    })
}

const TITLES: [&str; 16] = [
    "الساقية والفلج: حكاية الماء",
    "كيف نقرأ أسرع؟",
    "مدن من طين – الجزء",
    "قهوة الصباح ☕ الحلقة",
    "حديث عن «الوقت»",
    "The quiet channel",
    "Five minutes of maths",
    "Notes from the well",
    "Große Fragen, kurze Wege",
    "Cómo nace un río",
    "L'eau, l'été, l'île",
    "История воды",
    "水の道",
    "소리의 역사",
    "Tab\tand \"quotes\" \\ in a title",
    "Live 🎧 mix",
];

/// A title with its number; it may hold quotes, backslashes and tabs, as typed titles do.
pub fn title(rng: &mut StdRng, n: u64) -> String {
    format!("{} #{n}", TITLES[rng.random_range(0..TITLES.len())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn popular_contents_are_chosen_far_more_often_and_every_one_can_be() {
        let mut rng = StdRng::seed_from_u64(3);
        let stock: Vec<Content> = (0..100).map(|n| content(3, n, 100, &mut rng)).collect();
        let catalog = Catalog::new(stock.iter().map(Subject::from).collect(), &mut rng);
        let mut counts = std::collections::HashMap::new();
        for _ in 0..100_000 {
            *counts.entry(catalog.choose(&mut rng).unwrap()).or_insert(0_u32) += 1;
        }
        let mut sorted: Vec<u32> = counts.into_values().collect();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        assert_eq!(sorted.len(), 100);
        assert!(sorted[0] > 10 * sorted[50], "{sorted:?}");
    }

    #[test]
    fn contents_have_the_lengths_of_their_kind() {
        let mut rng = StdRng::seed_from_u64(4);
        for n in 0..1000 {
            let content = content(4, n, 1000, &mut rng);
            let fits = match (content.kind, content.length_seconds) {
                (Some(Kind::Newsletter), length) => length.is_none(),
                (_, Some(0)) => true,
                (Some(Kind::Podcast), Some(length)) => (1200..=7200).contains(&length),
                (Some(Kind::Video), Some(length)) => (300..=3600).contains(&length),
                _ => false,
            };
            assert!(fits && content.published < 0, "{content:?}");
        }
    }
}
