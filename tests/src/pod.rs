//! A process as a container runs it: it comes back under the same name and at the same port.

use std::path::{Path, PathBuf};
use std::process::Command;

use types::Role;

use crate::{Process, free_port, perigee};

/// One member of a cluster, whose process comes and goes.
pub struct Pod {
    /// What it does.
    pub role: Role,
    /// Its name.
    pub id: String,
    /// Where it is reached.
    pub grpc_port: u16,
    registry: String,
    model: PathBuf,
    settings: Vec<String>,
    folder: tempfile::TempDir,
}

impl Pod {
    /// A member that has not started, with these flags beside those that every member has.
    pub fn new(role: Role, id: &str, registry: &str, model: &Path, settings: &[&str]) -> Self {
        Self {
            role,
            id: id.to_owned(),
            grpc_port: free_port(),
            registry: registry.to_owned(),
            model: model.to_owned(),
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
            folder: tempfile::tempdir().expect("folder"),
        }
    }

    /// Starts its process.
    pub fn start(&self) -> Process {
        let mut command = Command::new(perigee());
        command
            .args([self.role.as_str(), "--registry", &self.registry, "--id", &self.id])
            .args(["--grpc-port", &self.grpc_port.to_string()])
            .args(&self.settings)
            .arg("--model")
            .arg(&self.model);
        Process::start(&mut command, self.folder.path(), &self.id)
    }

    /// What the chart's hook runs in its container: the settings are all that it has.
    ///
    /// # Panics
    ///
    /// It does not drain.
    pub fn drain_self(&self) {
        let config = self.folder.path().join("perigee.toml");
        let text = format!("[node]\nlisten = \"0.0.0.0\"\ngrpc_port = {}\n", self.grpc_port);
        std::fs::write(&config, text).expect("write the settings");
        let output = Command::new(perigee())
            .args(["node", "drain", "--self", "--wait"])
            .env("PERIGEE_CONFIG", config)
            .env("PERIGEE_NODE__ADVERTISE", "nowhere.invalid")
            .env("PERIGEE_ROUTER", "nowhere.invalid:1")
            .output()
            .expect("start");
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}");
        assert!(
            printed.starts_with(&format!("{} is drained", self.id)),
            "{printed}"
        );
    }
}
