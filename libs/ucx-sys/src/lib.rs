//! Raw bindings of UCX (`libucp`), resolved with `dlopen` at run time: one binary builds without UCX, runs where there
//! is none, and uses whichever version the site has, from 1.13 on.
//!
//! Invariant: every symbol that is declared was found when [`Library::load`] returned, so no call can miss one later.
//! UCX promises binary compatibility within its major version: structs only grow, and a field mask names the fields
//! that the caller knows. The bindings are of 1.13, the oldest version served; `regenerate.sh` writes them anew, and the
//! tests hold them against the headers of the installed version.
//!
//! Elsewhere: everything that is safe to call (`transfer::ucx`).
#![allow(unsafe_code)] // Foreign functions are what this crate is.

use std::ffi::{CStr, OsString};
use std::fmt;
use std::ops::Deref;
use std::path::{Path, PathBuf};

pub mod bindings;

pub use bindings::*;

/// The name under which the system's linker finds the library.
pub const SONAME: &str = "libucp.so.0";

/// The oldest version served.
pub const OLDEST: Version = Version {
    major: UCP_API_MAJOR,
    minor: UCP_API_MINOR,
    release: 0,
};

/// A version of UCX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Versions that differ here are not compatible.
    pub major: u32,
    /// Grows with every feature release.
    pub minor: u32,
    /// Grows with every correction.
    pub release: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.release)
    }
}

/// Why there is no UCX.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The library, or one that it needs, was not found.
    #[error("{} cannot be loaded: {reason}", path.display())]
    NotLoaded {
        /// What was looked for.
        path: PathBuf,
        /// The linker's words.
        reason: String,
    },
    /// It is older, or of another major version.
    #[error("{} is UCX {found}, but {OLDEST} or newer of major version {} is needed", path.display(), OLDEST.major)]
    Version {
        /// What was loaded.
        path: PathBuf,
        /// Its version.
        found: Version,
    },
}

/// UCX, loaded. It stays loaded until the process ends, since it starts threads and patches of its own.
pub struct Library {
    functions: &'static Ucp,
    version: Version,
    path: PathBuf,
}

impl Library {
    /// Loads the library: the file `path`, or [`SONAME`] wherever the system's linker finds it.
    pub fn load(path: Option<&Path>) -> Result<Self, LoadError> {
        let path = path.map_or_else(|| PathBuf::from(SONAME), Path::to_path_buf);
        let not_loaded = |reason: String| LoadError::NotLoaded {
            path: path.clone(),
            reason,
        };
        preload_neighbours(&path);
        // SAFETY: the initialisers of libucp and of what it links to are those of a library made to be loaded this
        // way; `path` is the operator's choice, like the binary itself.
        let functions = unsafe { Ucp::new(OsString::from(&path)) };
        let functions = functions.map_err(|error| not_loaded(with_source(&error)))?;
        let (mut major, mut minor, mut release) = (0, 0, 0);
        // SAFETY: three valid places for three integers.
        unsafe { functions.ucp_get_version(&raw mut major, &raw mut minor, &raw mut release) };
        let version = Version {
            major,
            minor,
            release,
        };
        // A library that was initialised once must not be unloaded, and one is loaded once in a process's life.
        let functions = Box::leak(Box::new(functions));
        if version.major != OLDEST.major || version < OLDEST {
            return Err(LoadError::Version { path, found: version });
        }
        Ok(Self {
            functions,
            version,
            path,
        })
    }

    /// The version that the library says it has.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a status means, in the library's words.
    pub fn explain(&self, status: ucs_status_t) -> String {
        // SAFETY: takes any integer, and returns a string that lives as long as the library.
        let text = unsafe { CStr::from_ptr(self.ucs_status_string(status)) };
        text.to_string_lossy().into_owned()
    }
}

impl Deref for Library {
    type Target = Ucp;

    fn deref(&self) -> &Ucp {
        self.functions
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Library")
            .field("path", &self.path)
            .field("version", &self.version)
            .finish()
    }
}

/// What a call that may go on in the background returned: `ucs_status_ptr_t` of `ucs/type/status.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// It ended at once, well.
    Done,
    /// It ended at once, with this error.
    Failed(ucs_status_t),
    /// It goes on; the request must be freed.
    Request(ucs_status_ptr_t),
}

impl Begun {
    /// Tells the cases apart: null, a small negative number (`UCS_PTR_IS_ERR`), or an address.
    pub fn of(pointer: ucs_status_ptr_t) -> Self {
        let number = pointer as isize;
        match number {
            0 => Self::Done,
            _ if (UCS_ERR_LAST as isize..0).contains(&number) => Self::Failed(number as ucs_status_t),
            _ => Self::Request(pointer),
        }
    }
}

/// Sets what UCX reads from the environment when it is loaded, where the operator has not: it logs to stderr, since
/// stdout carries data; it does not warn of variables that are not its own; and it leaves the process's signal handlers
/// alone. Returns false, and does nothing, when the process has more than one thread already.
#[allow(clippy::disallowed_methods)] // It is the library that is configured; it has no other way in.
pub fn prepare_environment() -> bool {
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    if !matches!(threads, Ok(1)) {
        return false;
    }
    for (name, value) in [
        ("UCX_LOG_FILE", "stderr"),
        ("UCX_WARN_UNUSED_ENV_VARS", "n"),
        ("UCX_HANDLE_ERRORS", "none"),
    ] {
        if std::env::var_os(name).is_none() {
            // SAFETY: this is the only thread of the process, so nobody reads the environment meanwhile.
            unsafe { std::env::set_var(name, value) };
        }
    }
    true
}

/// Loads the libraries that UCX is made of from where the operator says it is, so that they are found there and not in
/// another installation. Whatever cannot be loaded is left to the linker, which then says what it misses.
fn preload_neighbours(path: &Path) {
    let Some(folder) = path.parent().filter(|folder| folder.is_absolute()) else {
        return;
    };
    for name in ["libucm.so.0", "libucs.so.0", "libuct.so.0"] {
        let neighbour = folder.join(name);
        if !neighbour.exists() {
            continue;
        }
        let flags = libloading::os::unix::RTLD_LAZY | libloading::os::unix::RTLD_GLOBAL;
        // SAFETY: as in `Library::load`.
        if let Ok(library) = unsafe { libloading::os::unix::Library::open(Some(&neighbour), flags) } {
            std::mem::forget(library);
        }
    }
}

fn with_source(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}
