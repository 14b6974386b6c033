use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::*;

/// Longer than anything here takes; a test that waits for it has failed.
const DEADLINE: Duration = Duration::from_secs(30);
/// Set in the process that this one starts of its own program, to be signalled.
const CHILD: &str = "PERIGEE_TEST_SHUTDOWN_CHILD";

/// Not a test by itself: what the child process runs. It shuts down in order on "drain", and never on "hang".
#[test]
fn child_process() {
    let Ok(behaviour) = std::env::var(CHILD) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let shutdown = Shutdown::listen_with_parent().expect("handlers");
        say("listening");
        shutdown.started().await;
        say("ending");
        if behaviour == "hang" {
            std::future::pending::<()>().await;
        }
    });
    drop(runtime);
    say("ended");
}

fn say(word: &str) {
    println!("child: {word}");
    std::io::stdout().flush().expect("the parent reads");
}

struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(behaviour: &str) -> Self {
        let program = std::env::current_exe().expect("this test program");
        let mut child = Command::new(program)
            .args([
                "--exact",
                "shutdown::tests::child_process",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(CHILD, behaviour)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let stdout = child.stdout.take().expect("piped");
        let mut process = Self {
            stdin: child.stdin.take(),
            child,
            lines: BufReader::new(stdout).lines(),
        };
        process.expect("listening");
        process
    }

    /// Reads on until the child says the word.
    fn expect(&mut self, word: &str) {
        let said = format!("child: {word}");
        // The harness may write on the same line before.
        let found = self
            .lines
            .by_ref()
            .any(|line| line.expect("readable").ends_with(&said));
        assert!(found, "the child ended without {word:?}");
    }

    fn signal(&self, name: &str) {
        let command = format!("kill -{name} {}", self.child.id());
        let status = Command::new("sh")
            .args(["-c", &command])
            .status()
            .expect("a shell");
        assert!(status.success());
    }

    /// The pipe's end comes with the process's.
    fn wait(mut self) -> ExitStatus {
        self.lines.by_ref().for_each(drop);
        self.child.wait().expect("waits")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Has ended already, unless an assertion failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[rstest::rstest]
#[case("TERM")]
#[case("INT")]
fn a_signal_ends_the_process_in_order(#[case] signal: &str) {
    let mut process = Process::start("drain");
    process.signal(signal);
    process.expect("ended");
    assert!(process.wait().success());
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let mut process = Process::start("hang");
    process.signal("TERM");
    process.expect("ending");
    process.signal("INT");
    assert_eq!(process.wait().code(), Some(EXIT_INTERRUPTED));
}

#[test]
fn a_child_ends_with_its_parent() {
    let mut process = Process::start("drain");
    drop(process.stdin.take());
    process.expect("ended");
    assert!(process.wait().success());
}

#[tokio::test]
async fn what_a_parent_writes_is_no_end() {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let mut ended = Box::pin(end_of(reader));
    writer.write_all(b"hello\n").expect("writes");
    assert!(futures::poll!(&mut ended).is_pending());
    drop(writer);
    tokio::time::timeout(DEADLINE, ended).await.expect("ends");
}

#[test]
fn the_first_failure_counts() {
    let shutdown = Shutdown::new();
    assert!(!shutdown.is_started());
    shutdown.clone().fail(Error::internal("first"));
    shutdown.fail(Error::internal("second"));
    assert!(shutdown.is_started() && shutdown.token().is_cancelled());
    assert_eq!(shutdown.failure(), Some(&Error::internal("first")));
}
