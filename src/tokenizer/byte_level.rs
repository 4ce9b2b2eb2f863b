//! GPT-2's spelling of bytes as printable characters, in which byte-level vocabularies are written.

use std::sync::LazyLock;

/// The spelling ends below this character.
const END: usize = 0x144;

/// Indexed by character.
static BYTES: LazyLock<[Option<u8>; END]> = LazyLock::new(|| {
    let mut bytes = [None; END];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        // Bytes that are printable in Latin-1 stand for themselves, the rest follow from U+0100 on.
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let character = if printable { usize::from(byte) } else { next };
        next += usize::from(!printable);
        if let Some(spelt) = bytes.get_mut(character) {
            *spelt = Some(byte);
        }
    }
    bytes
});

/// The byte that `character` spells.
pub(super) fn byte(character: char) -> Option<u8> {
    *BYTES.get(character as usize)?
}

/// Indexed by byte.
static CHARACTERS: LazyLock<Vec<char>> = LazyLock::new(|| {
    let mut spelt: Vec<(u8, char)> =
        (0..END as u32).filter_map(char::from_u32).filter_map(|c| Some((byte(c)?, c))).collect();
    spelt.sort_unstable();
    spelt.into_iter().map(|(_, character)| character).collect()
});

/// The token that spells `bytes`.
pub(super) fn spell(bytes: &[u8]) -> String {
    bytes.iter().filter_map(|&byte| CHARACTERS.get(usize::from(byte))).collect()
}

/// Appends the bytes of a token. A token with a character outside the spelling stands for its own UTF-8,
/// as added tokens do.
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

/// The character that spells each byte.
#[cfg(test)]
pub(super) fn alphabet() -> impl Iterator<Item = char> {
    (0..END as u32).filter_map(char::from_u32).filter(|&character| byte(character).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_spelt_once() {
        let mut bytes: Vec<u8> = alphabet().filter_map(byte).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte('Ġ'), Some(b' '));
        assert_eq!(byte('Ċ'), Some(b'\n'));
        assert_eq!(byte('a'), Some(b'a'));
        assert_eq!(byte('\u{144}'), None);
    }

    #[test]
    fn spelling_is_undone() {
        let all: Vec<u8> = (0..=255).collect();
        let mut bytes = Vec::new();
        push_bytes(&spell(&all), &mut bytes);
        assert_eq!(bytes, all);
        assert_eq!(spell(b" a\n"), "ĠaĊ");
    }

    #[test]
    fn tokens_outside_the_spelling_stand_for_themselves() {
        let mut bytes = vec![1];
        push_bytes("Ġhi", &mut bytes);
        push_bytes("a b", &mut bytes);
        assert_eq!(bytes, b"\x01 hia b");
    }
}
