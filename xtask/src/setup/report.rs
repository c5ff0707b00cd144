//! What set-up has found, installed, and left to the user: told once, at the end.

use anyhow::{Result, bail};

/// One line for each thing that set-up has looked at.
#[derive(Default)]
pub(crate) struct Report {
    lines: Vec<Line>,
    /// Commands that finish the set-up.
    left: Vec<String>,
}

struct Line {
    state: State,
    thing: &'static str,
    text: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Found,
    Installed,
    /// Missing, and only some commands or tests need it.
    Without,
    Missing,
}

impl Report {
    /// It was there, and is used as it is.
    pub(crate) fn found(&mut self, thing: &'static str, text: impl Into<String>) {
        self.add(State::Found, thing, text);
    }

    /// It was installed just now.
    pub(crate) fn installed(&mut self, thing: &'static str, text: impl Into<String>) {
        self.add(State::Installed, thing, text);
    }

    /// It is missing, and set-up succeeds all the same.
    pub(crate) fn without(&mut self, thing: &'static str, text: impl Into<String>) {
        self.add(State::Without, thing, text);
    }

    /// It is missing, and set-up fails. `advice` are commands that install it.
    pub(crate) fn missing<A: IntoIterator<Item = String>>(
        &mut self,
        thing: &'static str,
        text: impl Into<String>,
        advice: A,
    ) {
        self.add(State::Missing, thing, text);
        self.left.extend(advice);
    }

    fn add(&mut self, state: State, thing: &'static str, text: impl Into<String>) {
        self.lines.push(Line { state, thing, text: text.into() });
    }

    /// Adds the lines of another report.
    pub(crate) fn append(&mut self, other: Self) {
        self.lines.extend(other.lines);
        self.left.extend(other.left);
    }

    /// Prints all lines. `is_brief`: one line only, if everything was there.
    ///
    /// # Errors
    ///
    /// Something that is needed is missing; the commands that install it have been printed.
    pub(crate) fn finish(&self, is_brief: bool) -> Result<()> {
        if is_brief && self.lines.iter().all(|line| line.state == State::Found) {
            println!("setup: complete");
            return Ok(());
        }
        println!();
        for Line { state, thing, text } in &self.lines {
            let state = match state {
                State::Found => "found",
                State::Installed => "installed",
                State::Without => "without",
                State::Missing => "MISSING",
            };
            println!("setup: {state:<9} {thing:<10} {text}");
        }
        if self.lines.iter().all(|line| line.state != State::Missing) {
            return Ok(());
        }
        println!("\nWhat is left to do:");
        for command in &self.left {
            println!("    {command}");
        }
        bail!("set-up is not complete; the commands above finish it");
    }
}

/// Progress, printed at once: what follows takes a while.
pub(super) fn say(thing: &str, text: &str) {
    println!("setup: {thing}: {text}");
}
