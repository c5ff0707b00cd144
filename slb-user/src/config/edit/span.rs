//! Where an instance stands in a file.
//!
//! To parse a whole file with thousands of backends takes a tenth of a second, one instance of it a fraction.

use std::ops::Range;

use memchr::memmem;

/// Where in a file an instance may stand that is named like that: from its header to that of the next one. None, if
/// what looks like a header may be within a string of several lines.
pub(super) fn parts(text: &str, name: &str) -> Vec<Range<usize>> {
    let has = |part: &str, what: &str| memmem::find(part.as_bytes(), what.as_bytes()).is_some();
    if ["\"\"\"", "'''"].iter().any(|mark| has(text, mark)) {
        return Vec::new();
    }
    let headers = memmem::find_iter(text.as_bytes(), "[[instance]]");
    let starts = headers.map(|at| text[..at].rfind('\n').map_or(0, |end| end + 1)..at);
    let mut starts: Vec<usize> = starts
        .filter(|indent| text[indent.clone()].chars().all(char::is_whitespace))
        .map(|indent| indent.start)
        .collect();
    starts.push(text.len());
    let names = [format!("\"{name}\""), format!("'{name}'")];
    let parts = starts.windows(2).map(|bounds| bounds[0]..bounds[1]);
    parts.filter(|part| names.iter().any(|name| has(&text[part.clone()], name))).collect()
}
