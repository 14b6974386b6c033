use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;

use super::*;

const CONTENT: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// A web server of one file: `/file` redirects to `/storage`, which honours ranges. Sends each request head it saw.
fn server(break_after: Option<usize>) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let url = format!("http://{}/file", listener.local_addr().expect("address"));
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().take(16) {
            let mut stream = stream.expect("accept");
            let head = read_head(&stream);
            answer(&mut stream, &head, break_after);
            tx.send(head).ok();
        }
    });
    (url, rx)
}

fn read_head(stream: &TcpStream) -> String {
    let mut lines = BufReader::new(stream).lines();
    let mut head = String::new();
    while let Some(Ok(line)) = lines.next() {
        if line.is_empty() {
            break;
        }
        head.push_str(&line.to_lowercase());
        head.push('\n');
    }
    head
}

fn answer(stream: &mut TcpStream, head: &str, break_after: Option<usize>) {
    if head.starts_with("get /file") {
        let hash: String = Sha256Hex::of(CONTENT);
        write!(
            stream,
            "HTTP/1.1 302 Found\r\nlocation: /storage\r\nx-linked-etag: \"{hash}\"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        .expect("answer");
        return;
    }
    let range = head.lines().find_map(|line| line.strip_prefix("range: bytes="));
    let from: usize = range.map_or(0, |range| range.trim_end_matches('-').parse().expect("range"));
    let body = &CONTENT[from..];
    let status = if range.is_some() {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    )
    .expect("answer");
    let end = if range.is_some() {
        body.len()
    } else {
        break_after.unwrap_or(body.len())
    };
    stream.write_all(&body[..end]).expect("answer");
}

struct Sha256Hex;

impl Sha256Hex {
    fn of(bytes: &[u8]) -> String {
        use sha2::{Digest, Sha256};
        Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

#[test]
fn an_interrupted_download_is_resumed_and_verified() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("file");
    let (url, requests) = server(Some(10));
    download(&agent(), &url, &path, None).expect_err("breaks off");
    assert!(!path.exists(), "an unfinished file must not have its final name");
    let pulled = download(&agent(), &url, &path, None).expect("resumes");
    assert_eq!(fs::read(&path).expect("file"), CONTENT);
    assert_eq!(pulled.sha256, Sha256Hex::of(CONTENT));
    assert!(requests.try_iter().any(|head| head.contains("range: bytes=10-")));
}

#[test]
fn wrong_content_is_refused_and_removed() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("file");
    let (url, _requests) = server(None);
    let error = download(&agent(), &url, &path, Some(&"0".repeat(64))).expect_err("wrong hash");
    assert_eq!(
        error.downcast_ref::<Error>().map(|error| error.code),
        Some(ErrorCode::Corrupt)
    );
    assert_eq!(fs::read_dir(folder.path()).expect("folder").count(), 0);
}

#[test]
fn references_are_read() {
    let parse = |text| {
        Reference::parse(text)
            .ok()
            .map(|r| (r.repository, r.file, r.revision))
    };
    assert_eq!(parse("a/b"), Some(("a/b".into(), None, "main".into())));
    assert_eq!(
        parse("a/b/c/d.gguf@v1"),
        Some(("a/b".into(), Some("c/d.gguf".into()), "v1".into()))
    );
    for bad in ["", "a", "a/", "/b", "a/b/../../c", "../b"] {
        assert_eq!(parse(bad), None, "{bad}");
    }
}

#[test]
fn a_repository_gives_its_safetensors_or_its_only_gguf() {
    let siblings = |names: &[&str]| -> Vec<Sibling> {
        names
            .iter()
            .map(|name| Sibling {
                rfilename: (*name).to_owned(),
            })
            .collect()
    };
    let chosen = choose(&siblings(&[
        "README.md",
        "config.json",
        "model.safetensors",
        "onnx/model.onnx",
        "a.gguf",
    ]));
    assert_eq!(chosen.expect("chosen"), ["config.json", "model.safetensors"]);
    assert_eq!(
        choose(&siblings(&["README.md", "a.gguf"])).expect("chosen"),
        ["a.gguf"]
    );
    assert!(choose(&siblings(&["a.gguf", "b.gguf"])).is_err());
    assert!(choose(&siblings(&["README.md"])).is_err());
}
