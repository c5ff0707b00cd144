//! The first file system of a machine: programs of this one, with what they need.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufWriter, Cursor, Read, Seek},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use cpio::{NewcBuilder, write_cpio};

use crate::process;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Files by where they are to be.
#[derive(Default)]
pub(super) struct Image {
    files: BTreeMap<PathBuf, Content>,
    libraries: BTreeSet<PathBuf>,
}

enum Content {
    Folder,
    File(PathBuf),
    Text(String),
}

trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

impl Image {
    /// A program, with its libraries where they are here.
    ///
    /// # Errors
    ///
    /// A library is missing here too.
    pub(super) fn add_program(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.add_file(from, to)?;
        // Fails for a static program, which needs none.
        let libraries = process::output("ldd", &[&from.display().to_string()]);
        for library in paths(&libraries.unwrap_or_default()) {
            self.add_file(&library, &library)?;
            self.libraries.extend(library.parent().map(Path::to_owned));
        }
        Ok(())
    }

    /// One file.
    ///
    /// # Errors
    ///
    /// It is not there.
    pub(super) fn add_file(&mut self, from: &Path, to: &Path) -> Result<()> {
        let from = from.canonicalize().with_context(|| from.display().to_string())?;
        self.add(to, Content::File(from));
        Ok(())
    }

    /// A program that is a text.
    pub(super) fn add_script(&mut self, to: &Path, text: String) {
        self.add(to, Content::Text(text));
    }

    /// Folders with libraries, for the dynamic loader: it has no cache there.
    pub(super) fn library_path(&self) -> String {
        let folders: Vec<_> =
            self.libraries.iter().map(|path| path.display().to_string()).collect();
        folders.join(":")
    }

    fn add(&mut self, to: &Path, content: Content) {
        for folder in to.ancestors().skip(1) {
            self.files.entry(folder.to_owned()).or_insert(Content::Folder);
        }
        self.files.insert(to.to_owned(), content);
    }

    /// As the kernel unpacks it.
    ///
    /// # Errors
    ///
    /// A file cannot be read, or the disk is full.
    pub(super) fn write(&self, to: &Path) -> Result<()> {
        let mut inputs: Vec<(NewcBuilder, Box<dyn ReadSeek>)> = Vec::new();
        // A folder comes before what is in it: its path is the beginning of theirs.
        for (path, content) in &self.files {
            let name = path.strip_prefix("/").unwrap_or(path).display().to_string();
            if name.is_empty() {
                continue;
            }
            let entry = NewcBuilder::new(&name);
            inputs.push(match content {
                Content::Folder => (entry.mode(FOLDER), Box::new(Cursor::new([]))),
                Content::Text(text) => (entry.mode(PROGRAM), Box::new(Cursor::new(text.clone()))),
                Content::File(from) => {
                    let file = File::open(from).with_context(|| from.display().to_string())?;
                    (entry.mode(PROGRAM), Box::new(file))
                }
            });
        }
        let write = || write_cpio(inputs.into_iter(), BufWriter::new(fs::File::create(to)?));
        write()
            .and_then(|file| file.into_inner()?.sync_all())
            .with_context(|| to.display().to_string())
    }
}

/// Of what `ldd` prints: `libc.so.6 => /lib/libc.so.6 (0x7f…)`, `/lib64/ld-linux.so.2 (0x7f…)`.
fn paths(ldd: &str) -> Vec<PathBuf> {
    let last_path =
        |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    ldd.lines().filter_map(last_path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_what_ldd_prints_when_it_is_read_then_every_library_is_found() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86/libc.so.6 (0x00007f)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let expected = ["/lib/x86/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(paths(ldd), expected);
    }

    #[test]
    fn given_a_file_deep_down_when_it_is_added_then_the_folders_above_come_before_it() {
        let mut image = Image::default();
        image.add_script(Path::new("/a/b/c"), "text".to_owned());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        image.write(&path).unwrap();
        let mut names = Vec::new();
        let mut file = File::open(&path).unwrap();
        loop {
            let reader = cpio::NewcReader::new(file).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push(reader.entry().name().to_owned());
            file = reader.finish().unwrap();
        }
        assert_eq!(names, ["a", "a/b", "a/b/c"]);
    }
}
