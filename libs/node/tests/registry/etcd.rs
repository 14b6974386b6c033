//! A real etcd, on ports of its own and in a directory of its own, that ends with its value.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

pub(crate) struct Etcd {
    directory: TempDir,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

impl Etcd {
    pub(crate) fn start() -> Self {
        let [client_port, peer_port] = free_ports();
        let mut etcd = Self {
            directory: tempfile::tempdir().expect("a directory"),
            client_port,
            peer_port,
            child: None,
        };
        etcd.resume();
        etcd
    }

    pub(crate) fn url(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.client_port)
    }

    /// Kills it, as a power cut would: nothing is written any more.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("runs");
        child.kill().expect("can be killed");
        child.wait().expect("has ended");
    }

    /// Starts it, again on what it wrote before. Whoever needs it waits until it answers.
    pub(crate) fn resume(&mut self) {
        let client = format!("http://127.0.0.1:{}", self.client_port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let log = std::fs::File::create(self.directory.path().join("log")).expect("a file");
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.directory.path().join("data"))
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
            .args(["--initial-cluster", &format!("default={peer}")])
            // Elections among one member need not wait for others.
            .args(["--heartbeat-interval", "20", "--election-timeout", "200"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.child = Some(child.unwrap_or_else(|error| {
            panic!("these tests need the etcd server in the PATH: {error}; `apt-get install etcd-server` installs it, and so does `make test`")
        }));
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

/// Two ports that were free a moment ago. etcd cannot be told to take a free one itself.
fn free_ports() -> [u16; 2] {
    // Both are held until both are known, so that they differ.
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("bound").port())
}
