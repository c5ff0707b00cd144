//! Text of others on a terminal or in a log: names, quoted configuration, what servers answer.
//!
//! Control characters could move the cursor, hide lines, or make a terminal answer; some characters of Unicode turn the
//! direction of the text around or cannot be seen. All of them are shown as `\\u{1b}` and the like.

use std::fmt::{self, Display, Formatter, Write};

/// Whether a character is to be seen as what it is: no control character, nothing invisible that changes the text
/// around it.
#[must_use]
pub const fn is_plain(c: char) -> bool {
    !matches!(c,
        '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' // Control characters (Cc).
        | '\u{ad}' // Soft hyphen.
        | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' // Direction.
        | '\u{180e}' | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' // Invisible.
        | '\u{2028}' | '\u{2029}' // Line and paragraph separators.
        | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}' // Marks and tags.
    )
}

/// One line of text, in which every character that is not [plain](is_plain) is escaped.
#[derive(Clone, Copy, Debug)]
pub struct Printable<T>(pub T);

impl<T: Display> Display for Printable<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(Escape { out: f, keeps: "" }, "{}", self.0)
    }
}

/// Text of several lines: line breaks and tabs stay as they are.
#[derive(Clone, Copy, Debug)]
pub struct PrintableLines<T>(pub T);

impl<T: Display> Display for PrintableLines<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(Escape { out: f, keeps: "\n\t" }, "{}", self.0)
    }
}

struct Escape<'a, 'b> {
    out: &'a mut Formatter<'b>,
    /// Characters that stay although they are not plain.
    keeps: &'static str,
}

impl Write for Escape<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(|c| !is_plain(c) && !self.keeps.contains(c)) {
            self.out.write_str(&rest[..at])?;
            let mut following = rest[at..].chars();
            if let Some(c) = following.next() {
                match c {
                    '\n' | '\r' | '\t' => write!(self.out, "{}", c.escape_default())?,
                    _ => write!(self.out, "{}", c.escape_unicode())?,
                }
            }
            rest = following.as_str();
        }
        self.out.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_and_direction_are_escaped_and_other_text_stays() {
        let cases = [
            ("web-1 käse 日本 \u{1f980}", "web-1 käse 日本 \u{1f980}"),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("a\u{9b}31m\u{7f}", "a\\u{9b}31m\\u{7f}"),
            ("a\nb\rc\td", "a\\nb\\rc\\td"),
            ("\u{202e}drowssap\u{2066}", "\\u{202e}drowssap\\u{2066}"),
            ("a\u{200b}b\u{feff}\u{2028}", "a\\u{200b}b\\u{feff}\\u{2028}"),
        ];
        for (text, expected) in cases {
            assert_eq!(Printable(text).to_string(), expected);
        }
        assert_eq!(PrintableLines("a\n\tb\u{1b}\r\n").to_string(), "a\n\tb\\u{1b}\\r\n");
    }
}
