//! GPT-2's mapping of bytes to printable characters. Byte-level vocabularies spell their tokens with it.

use std::sync::LazyLock;

/// One more than the last character that the mapping uses.
const END: usize = 0x144;

/// The byte of each character.
static BYTES: LazyLock<[Option<u8>; END]> = LazyLock::new(|| {
    let mut bytes = [None; END];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        // Bytes that are printable in Latin-1 map to themselves, the others to U+0100 and up.
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let character = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        if let Some(spelt) = bytes.get_mut(character) {
            *spelt = Some(byte);
        }
    }
    bytes
});

/// The byte that maps to `character`.
pub(super) fn byte(character: char) -> Option<u8> {
    *BYTES.get(character as usize)?
}

/// The character of each byte.
static CHARACTERS: LazyLock<Vec<char>> = LazyLock::new(|| {
    let mut spelt: Vec<(u8, char)> =
        (0..END as u32).filter_map(char::from_u32).filter_map(|c| Some((byte(c)?, c))).collect();
    spelt.sort_unstable();
    spelt.into_iter().map(|(_, character)| character).collect()
});

/// Spells `bytes` as a token.
pub(super) fn spell(bytes: &[u8]) -> String {
    bytes.iter().filter_map(|&byte| CHARACTERS.get(usize::from(byte))).collect()
}

/// Appends the bytes of a token. A token with a character outside the mapping, such as an added token, is
/// taken as plain UTF-8.
pub(super) fn push_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for character in token.chars() {
        match byte(character) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// All characters of the mapping.
#[cfg(test)]
pub(super) fn alphabet() -> impl Iterator<Item = char> {
    (0..END as u32).filter_map(char::from_u32).filter(|&character| byte(character).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = alphabet().filter_map(byte).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte('Ġ'), Some(b' '));
        assert_eq!(byte('Ċ'), Some(b'\n'));
        assert_eq!(byte('a'), Some(b'a'));
        assert_eq!(byte('\u{144}'), None);
    }

    #[test]
    fn push_bytes_inverts_spell() {
        let all: Vec<u8> = (0..=255).collect();
        let mut bytes = Vec::new();
        push_bytes(&spell(&all), &mut bytes);
        assert_eq!(bytes, all);
        assert_eq!(spell(b" a\n"), "ĠaĊ");
    }

    #[test]
    fn tokens_outside_the_mapping_are_plain_text() {
        let mut bytes = vec![1];
        push_bytes("Ġhi", &mut bytes);
        push_bytes("a b", &mut bytes);
        assert_eq!(bytes, b"\x01 hia b");
    }
}
