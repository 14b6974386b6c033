//! The file of contexts: clusters by name, each with how it is reached. It never holds a key, only the names of files with keys.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use node::{ApiKey, tls};
use serde::{Deserialize, Serialize};
use types::{Error, ErrorCode};

/// Names the file in place of the one in the user's folder.
const PATH_VARIABLE: &str = "PERIGEE_CONTEXTS";
/// A file beyond this is some other file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// No key is longer.
const KEY_BYTES_MAX: u64 = 4096;
const NAME_BYTES_MAX: usize = 64;

/// All contexts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Contexts {
    /// Name of the one that is meant where none is named. Empty: none.
    pub(super) current: String,
    pub(super) contexts: BTreeMap<String, Context>,
}

/// How one cluster is reached. Empty where nothing is said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Context {
    pub(super) router: String,
    pub(super) api_key_file: String,
    pub(super) model: String,
    pub(super) tls: TlsFiles,
}

/// As `[tls]` of the settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct TlsFiles {
    pub(super) certificate: String,
    pub(super) key: String,
    pub(super) authority: String,
    pub(super) name: String,
}

impl From<TlsFiles> for tls::Config {
    fn from(files: TlsFiles) -> Self {
        let TlsFiles {
            certificate,
            key,
            authority,
            name,
        } = files;
        Self {
            certificate,
            key,
            authority,
            name,
        }
    }
}

/// Where contexts are kept, if the environment says so.
pub(super) fn path() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let folder = set("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&set("HOME")?).join(".config")));
    set(PATH_VARIABLE)
        .map(PathBuf::from)
        .or_else(|| Some(folder?.join("perigee/contexts.toml")))
}

/// A name that tables and scripts can carry.
pub(super) fn check_name(name: &str) -> Result<(), Error> {
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    match fits {
        true => Ok(()),
        false => Err(Error::invalid(
            "name",
            format!(
                "a context is named by up to {NAME_BYTES_MAX} letters, digits, '.', '_' and '-', not {name:?}"
            ),
        )),
    }
}

impl Contexts {
    /// Reads the file. One that is not there has no contexts.
    pub(super) fn load(path: &Path) -> Result<Self, Error> {
        match read(path, FILE_BYTES_MAX) {
            Ok(text) => Self::parse(&text, path),
            Err(error) if error.code == ErrorCode::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        toml::from_str(text).map_err(|error| {
            let line = error
                .span()
                .map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            let message = format!("{}:{line}: {}", path.display(), error.message());
            Error::invalid("contexts", message)
        })
    }

    /// The context of that name.
    pub(super) fn get(&self, name: &str) -> Result<&Context, Error> {
        self.contexts.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.contexts.keys().map(String::as_str).collect();
            let message = match known.is_empty() {
                true => format!("no context is named {name}; perigee context set makes one"),
                false => format!("no context is named {name}; there are: {}", known.join(", ")),
            };
            Error::new(ErrorCode::NotFound, message)
        })
    }

    /// Replaces the file at once, so that whoever reads it meanwhile sees the old one or the new one. Only its owner may read it.
    pub(super) fn save(&self, path: &Path) -> anyhow::Result<()> {
        // A link, as to a file among others under version control, stays one.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let folder = path.parent().context("a file lies in a folder")?;
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("create {}", folder.display()))?;
        let temporary = path.with_extension(format!("toml.{}", std::process::id()));
        let written = write_new(&temporary, &toml::to_string(self)?)
            .and_then(|()| fs::rename(&temporary, &path).context("rename"));
        if written.is_err() {
            // What is wrong is told below; the rest may or may not be there.
            let _ = fs::remove_file(&temporary);
        }
        written.with_context(|| format!("write {}", path.display()))
    }
}

fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}

/// The key that a file holds.
pub(super) fn read_key(path: &Path) -> Result<ApiKey, Error> {
    let key = ApiKey::new(read(path, KEY_BYTES_MAX)?.trim());
    key.map_err(|error| Error::invalid("api_key_file", format!("{}: {error}", path.display())))
}

fn read(path: &Path, bytes_max: u64) -> Result<String, Error> {
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(bytes_max + 1).read_to_string(&mut text));
    let refused = |code, reason: String| Err(Error::new(code, format!("{}: {reason}", path.display())));
    match read {
        Ok(bytes) if bytes as u64 > bytes_max => {
            refused(ErrorCode::Invalid, format!("at most {bytes_max} bytes are read"))
        }
        Ok(_) => Ok(text),
        Err(error) => refused(
            match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => ErrorCode::NotFound,
                ErrorKind::PermissionDenied => ErrorCode::Denied,
                _ => ErrorCode::Invalid,
            },
            error.to_string(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn contexts_come_back_as_they_went_and_for_their_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new/contexts.toml");
        assert_eq!(Contexts::load(&path), Ok(Contexts::default()));
        let mut contexts = Contexts {
            current: "a".into(),
            ..Contexts::default()
        };
        let context = Context {
            router: "10.0.0.1:50051".into(),
            ..Context::default()
        };
        contexts.contexts.insert("a".into(), context);
        contexts.save(&path).expect("written");
        contexts.contexts.insert("b".into(), Context::default());
        contexts.save(&path).expect("written again");
        assert_eq!(Contexts::load(&path), Ok(contexts));
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        let folder = path.parent().expect("a folder");
        assert_eq!(
            (mode(folder), fs::read_dir(folder).expect("there").count()),
            (0o700, 1)
        );
    }

    #[test]
    fn an_unknown_key_is_refused_by_its_name_and_line() {
        for (text, line, key) in [
            ("current = \"a\"\nnext = 1\n", ":2: ", "`next`"),
            ("[contexts.a]\nrouters = \"x\"\n", ":2: ", "`routers`"),
            ("[contexts.a.tls]\nca = \"x\"\n", ":2: ", "`ca`"),
        ] {
            let error = Contexts::parse(text, Path::new("c.toml")).expect_err(text);
            assert_eq!(error.code, ErrorCode::Invalid);
            assert!(
                error.message.starts_with("c.toml")
                    && error.message.contains(line)
                    && error.message.contains(key),
                "{error}"
            );
        }
    }

    #[test]
    fn an_unknown_context_is_answered_with_those_there_are() {
        let mut contexts = Contexts::default();
        let error = contexts.get("c").expect_err("none");
        assert!(error.message.contains("perigee context set"), "{error}");
        contexts.contexts.insert("a".into(), Context::default());
        let error = contexts.get("c").expect_err("another one");
        assert_eq!(
            (error.code, error.message.ends_with("there are: a")),
            (ErrorCode::NotFound, true)
        );
    }

    #[test]
    fn names_are_of_letters_that_tables_and_scripts_can_carry() {
        for name in ["prod", "eu-west.1_b"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
        for name in ["", "a b", "ä", "x/y", &"a".repeat(65)] {
            assert_eq!(check_name(name).expect_err(name).code, ErrorCode::Invalid);
        }
    }

    #[test]
    fn a_file_with_no_key_is_refused_without_saying_what_is_in_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        assert_eq!(read_key(&path).expect_err("nothing").code, ErrorCode::NotFound);
        fs::write(&path, "perigee-0a\n").expect("written");
        assert_eq!(read_key(&path).expect("a key").secret(), "perigee-0a");
        fs::write(&path, "secret words\n").expect("written");
        let error = read_key(&path).expect_err("no key");
        assert!(!error.message.contains("secret"), "{error}");
        fs::write(&path, "a".repeat(5000)).expect("written");
        assert_eq!(read_key(&path).expect_err("too long").code, ErrorCode::Invalid);
    }
}
