//! Line ends of a file that is edited: those of lines that stay, stay.

/// The text `after` an edit, whose lines end in LF, with the line ends of the file `before`. Lines that the edit has made
/// end as most of the others do.
pub(super) fn restore(before: &str, after: &str) -> String {
    let old: Vec<&str> = before.split_inclusive('\n').collect();
    let new: Vec<&str> = after.split_inclusive('\n').collect();
    let is_same = |(old, new): &(&&str, &&str)| old.replace("\r\n", "\n") == **new;
    let head = old.iter().zip(&new).take_while(is_same).count();
    let (old_rest, new_rest) = (&old[head..], &new[head..]);
    let tail = old_rest.iter().rev().zip(new_rest.iter().rev()).take_while(is_same).count();
    let is_crlf = 2 * old.iter().filter(|line| line.ends_with("\r\n")).count() > old.len();
    let made = new_rest[..new_rest.len() - tail].iter().map(|line| match line.strip_suffix('\n') {
        Some(text) if is_crlf => format!("{text}\r\n"),
        _ => (*line).to_owned(),
    });
    let kept = |lines: &[&str]| lines.concat();
    kept(&old[..head]) + &made.collect::<String>() + &kept(&old_rest[old_rest.len() - tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_stay_keep_their_ends_and_new_ones_end_as_most_do() {
        let cases = [
            ("a\r\nb\r\nc\r\n", "a\nB\nc\n", "a\r\nB\r\nc\r\n"),
            ("a\r\nb\nc\r\n", "a\nb\nnew\nc\n", "a\r\nb\nnew\r\nc\r\n"),
            ("a\nb\nc\r\n", "a\nnew\nb\nc\n", "a\nnew\nb\nc\r\n"),
            ("a\r\nb\r\nc", "a\nc", "a\r\nc"),
            ("a\r\na\r\na\n", "a\na\na\na\n", "a\r\na\r\na\na\r\n"),
            ("a\r\n", "", ""),
        ];
        for (before, after, expected) in cases {
            assert_eq!(restore(before, after), expected, "{before:?} {after:?}");
        }
    }
}
