//! Floats by the million: falaj writes the digits of a binary float itself.

use falaj::pgoutput::Cell;
use falaj::schema::Type;
use falaj::value::write_text;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::rig::{Pipeline, Servers};

const SEED: u64 = 4;

fn written(ty: Type, bytes: &[u8]) -> String {
    let mut out = Vec::new();
    write_text(ty, Cell::Binary(bytes), &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// Around every power of two and of ten, where the shortest digits change their length or lie midway, and at random.
fn doubles() -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let edges = (0..=2046_u64).flat_map(|e| (0..4).map(move |d| f64::from_bits((e << 52) + d).to_bits()));
    let tens = (-320..=308).flat_map(|e| {
        let ten = format!("1e{e}").parse::<f64>().unwrap().to_bits();
        [ten.saturating_sub(1), ten, ten + 1]
    });
    let random = (0..60_000).map(|_| rng.random::<u64>());
    // Whole numbers, and such with a few binary digits after the point, near the limit of what a double holds exactly:
    // there two decimals can be as near, and one can lie just midway between two floats.
    let mut rng = StdRng::seed_from_u64(SEED);
    let whole = (0..60_000).map(move |_| {
        let units = f64::from(1_u32 << rng.random_range(0..27));
        (rng.random_range(1_u64..1 << 62) as f64 / units).to_bits()
    });
    edges.chain(tens).chain(random).chain(whole).map(f64::from_bits).collect()
}

fn singles() -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(SEED);
    let edges = (0..=254_u32).flat_map(|e| (0..4).map(move |d| (e << 23) + d));
    let random = (0..60_000).map(|_| rng.random::<u32>());
    let mut rng = StdRng::seed_from_u64(SEED);
    let whole = (0..60_000).map(move |_| {
        let units = (1_u32 << rng.random_range(0..16)) as f32;
        (rng.random_range(1_u32..u32::MAX) as f32 / units).to_bits()
    });
    edges.chain(random).chain(whole).map(f32::from_bits).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn floats_have_the_digits_that_postgres_gives_them() {
    let p = Pipeline::bare(Servers::shared(), "floats").await;
    let sql = |ty: &str| format!("SELECT x::text FROM unnest($1::{ty}[]) WITH ORDINALITY AS u (x, n) ORDER BY n");
    let doubles = doubles();
    let texts = p.sql.query(&sql("float8"), &[&doubles]).await.unwrap();
    let wrong =
        doubles.iter().zip(&texts).map(|(x, row)| (written(Type::Float8, &x.to_be_bytes()), row.get::<_, String>(0)));
    assert_eq!(wrong.filter(|(found, wanted)| found != wanted).collect::<Vec<_>>(), []);
    let singles = singles();
    let texts = p.sql.query(&sql("float4"), &[&singles]).await.unwrap();
    let wrong =
        singles.iter().zip(&texts).map(|(x, row)| (written(Type::Float4, &x.to_be_bytes()), row.get::<_, String>(0)));
    assert_eq!(wrong.filter(|(found, wanted)| found != wanted).collect::<Vec<_>>(), []);
    assert!(doubles.len() > 120_000 && singles.len() > 120_000);
}
