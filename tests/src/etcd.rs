//! A real etcd for a test.

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use crate::certificates::Files;
use crate::{Process, free_port, wait_for};

/// One etcd member with its data in a folder that outlives its process.
pub struct Etcd {
    folder: tempfile::TempDir,
    client_port: u16,
    peer_port: u16,
    process: Option<Process>,
    /// What it shows, and what whoever connects must show.
    tls: Option<Files>,
}

impl Etcd {
    /// Starts an empty etcd.
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// Starts an empty etcd that demands a certificate of the same authority.
    pub fn start_over_tls(files: &Files) -> Self {
        Self::start_with(Some(files.clone()))
    }

    fn start_with(tls: Option<Files>) -> Self {
        let mut etcd = Self {
            folder: tempfile::tempdir().expect("folder"),
            client_port: free_port(),
            peer_port: free_port(),
            process: None,
            tls,
        };
        etcd.resume();
        etcd
    }

    /// What `--registry` takes.
    pub fn url(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.client_port)
    }

    /// `host:port`, as `etcdctl` takes it.
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// Kills the process; the data stay.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Starts the process on the data that are there, and waits until it listens.
    pub fn resume(&mut self) {
        let scheme = self.tls.as_ref().map_or("http", |_| "https");
        let client = format!("{scheme}://127.0.0.1:{}", self.client_port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let mut command = Command::new("etcd");
        command
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
            .args(["--name", "test", "--data-dir"])
            .arg(self.data())
            .args([
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &format!("test={peer}")]);
        if let Some(files) = &self.tls {
            command
                .arg("--client-cert-auth")
                .arg("--trusted-ca-file")
                .arg(&files.authority);
            command.arg("--cert-file").arg(&files.certificate);
            command.arg("--key-file").arg(&files.key);
        }
        self.process = Some(Process::start(&mut command, self.folder.path(), "etcd"));
        wait_for("etcd to listen", || TcpStream::connect(self.endpoint()).ok());
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }
}
