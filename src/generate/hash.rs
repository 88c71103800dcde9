//! Identifiers that are a function of the seed alone.

use uuid::{Builder, Uuid};

/// Domain of content ids.
pub const CONTENT: u64 = 1;
/// Domain of user ids.
pub const USER: u64 = 2;

/// The `n`th version-4 UUID of a domain.
pub fn uuid(seed: u64, domain: u64, n: u64) -> Uuid {
    let high = mix(mix(seed ^ mix(domain)) ^ n);
    let low = mix(high ^ n.rotate_left(32));
    Builder::from_random_bytes(((u128::from(high) << 64) | u128::from(low)).to_be_bytes()).into_uuid()
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters neighbours.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_by_seed_domain_and_number_and_stay_the_same() {
        let ids = [uuid(1, USER, 0), uuid(1, USER, 1), uuid(1, CONTENT, 0), uuid(2, USER, 0)];
        for (i, id) in ids.iter().enumerate() {
            assert_eq!(id.get_version_num(), 4);
            assert_eq!(ids.iter().filter(|other| *other == id).count(), 1, "{i}");
        }
        assert_eq!(uuid(1, USER, 7), uuid(1, USER, 7));
    }
}
