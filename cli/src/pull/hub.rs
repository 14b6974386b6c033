//! The Hugging Face hub, or any web server, over plain HTTPS.
//!
//! `HF_TOKEN` authorises gated models and `HF_ENDPOINT` names a mirror, as in the hub's own client. The token goes to the
//! hub alone: redirects to its storage are followed without it.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use types::{Error, ErrorCode};
use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body};

use super::{Pulled, accept, present};
use crate::output;

const HUB: &str = "https://huggingface.co";
/// A connection that is silent for so long is given up; a new `model pull` resumes.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const REDIRECTS_MAX: usize = 5;
/// A listing of a repository larger than this is none that we could serve.
const LISTING_BYTES_MAX: u64 = 8 << 20;

/// What a model directory needs beside its weights.
const SIDE_FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// `ORG/REPO[/FILE][@REVISION]`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reference {
    repository: String,
    file: Option<String>,
    revision: String,
}

impl Reference {
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let mut parts = path.splitn(3, '/');
        let valid = |part: &&str| !part.is_empty() && *part != "." && *part != "..";
        let (Some(owner), Some(name)) = (parts.next().filter(valid), parts.next().filter(valid)) else {
            return Err(Error::invalid(
                "name",
                format!("hf:{text} is not of the form hf:ORG/REPO[/FILE][@REVISION]"),
            ));
        };
        let file = parts.next().filter(|file| !file.is_empty());
        if file.is_some_and(|file| file.split('/').any(|part| !valid(&part))) {
            return Err(Error::invalid(
                "name",
                format!("hf:{text} names a file outside its repository"),
            ));
        }
        Ok(Self {
            repository: format!("{owner}/{name}"),
            file: file.map(str::to_owned),
            revision: revision.to_owned(),
        })
    }
}

#[derive(Deserialize)]
struct Listing {
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Gets one file, or everything that a model directory needs.
pub(super) fn pull(reference: &Reference, to: &Path, sha256: Option<&str>) -> anyhow::Result<Vec<Pulled>> {
    let hub = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| HUB.to_owned());
    let agent = agent();
    let url = |file: &str| {
        format!(
            "{hub}/{}/resolve/{}/{file}",
            reference.repository, reference.revision
        )
    };
    if let Some(file) = &reference.file {
        let name = file.rsplit('/').next().unwrap_or(file);
        return Ok(vec![download(&agent, &url(file), &to.join(name), sha256)?]);
    }
    if sha256.is_some() {
        bail!(Error::invalid(
            "sha256",
            "--sha256 needs a single FILE, but a whole repository is asked for"
        ));
    }
    let listing_url = format!(
        "{hub}/api/models/{}/revision/{}",
        reference.repository, reference.revision
    );
    let mut response = get(&agent, &listing_url, 0)?;
    let text = response
        .body_mut()
        .with_config()
        .limit(LISTING_BYTES_MAX)
        .read_to_string()?;
    let listing: Listing = serde_json::from_str(&text).context("read the repository's listing")?;
    let files = choose(&listing.siblings)?;
    let folder = to.join(reference.repository.replace('/', "--"));
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    files
        .iter()
        .map(|file| download(&agent, &url(file), &folder.join(file), None))
        .collect()
}

/// The safetensors model of a repository; one GGUF file where there is just one.
fn choose(siblings: &[Sibling]) -> Result<Vec<String>, Error> {
    let names = || {
        siblings
            .iter()
            .map(|sibling| sibling.rfilename.as_str())
            .filter(|name| !name.contains('/'))
    };
    let weights: Vec<&str> = names().filter(|name| name.ends_with(".safetensors")).collect();
    if !weights.is_empty() {
        return Ok(names()
            .filter(|name| SIDE_FILES.contains(name) || weights.contains(name))
            .map(str::to_owned)
            .collect());
    }
    let gguf: Vec<&str> = names().filter(|name| name.ends_with(".gguf")).collect();
    match gguf.as_slice() {
        [one] => Ok(vec![(*one).to_owned()]),
        [] => Err(Error::new(
            ErrorCode::NotFound,
            "the repository has neither safetensors nor GGUF files",
        )),
        many => Err(Error::invalid(
            "name",
            format!(
                "the repository has several GGUF files, name one: {}",
                many.join(", ")
            ),
        )),
    }
}

/// Gets a file by its URL.
pub(super) fn pull_url(url: &str, to: &Path, sha256: Option<&str>) -> anyhow::Result<Pulled> {
    let path = url.split(['?', '#']).next().unwrap_or(url);
    let name = path
        .rsplit('/')
        .next()
        .filter(|name| !name.is_empty() && *name != "..")
        .context("the URL names no file")?;
    download(&agent(), url, &to.join(name), sha256)
}

fn agent() -> Agent {
    Agent::config_builder()
        .max_redirects(0)
        .http_status_as_error(false)
        .timeout_connect(Some(SILENCE_MAX))
        .timeout_recv_response(Some(SILENCE_MAX))
        .build()
        .into()
}

/// Requests `url` from byte `from` on, following redirects without carrying the token to another host.
fn get(agent: &Agent, url: &str, from: u64) -> anyhow::Result<Response<Body>> {
    let mut first_hash = None;
    let origin: Uri = url.parse().with_context(|| format!("read {url}"))?;
    let mut current = origin.clone();
    for _ in 0..=REDIRECTS_MAX {
        let mut request = agent.get(current.clone());
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        if let Ok(token) = std::env::var("HF_TOKEN")
            && current.authority() == origin.authority()
        {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut response = request.call().with_context(|| format!("get {current}"))?;
        // The hub names the hash of a large file on its own answer, not on its storage's.
        first_hash = first_hash.or_else(|| linked_sha256(response.headers()));
        if !response.status().is_redirection() {
            if let Some(hash) = first_hash {
                response.extensions_mut().insert(LinkedHash(hash));
            }
            return Ok(response);
        }
        let location = header(response.headers(), "location").context("a redirect names no location")?;
        current = resolve(&current, &location)?;
    }
    bail!("{url} redirects more than {REDIRECTS_MAX} times")
}

#[derive(Clone)]
struct LinkedHash(String);

fn resolve(base: &Uri, location: &str) -> anyhow::Result<Uri> {
    if location.starts_with('/') {
        let authority = base.authority().context("the URL has no host")?;
        let scheme = base.scheme_str().unwrap_or("https");
        return Ok(format!("{scheme}://{authority}{location}").parse()?);
    }
    Ok(location.parse()?)
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// The sha256 that the hub states for files in its large-file storage.
fn linked_sha256(headers: &HeaderMap) -> Option<String> {
    let tag = header(headers, "x-linked-etag")?;
    let tag = tag.trim_start_matches("W/").trim_matches('"');
    (tag.len() == 64 && tag.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| tag.to_owned())
}

fn download(agent: &Agent, url: &str, path: &Path, sha256: Option<&str>) -> anyhow::Result<Pulled> {
    if sha256.is_some()
        && let Some(pulled) = present(path, sha256)?
    {
        return Ok(pulled);
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let have = fs::metadata(partial).map_or(0, |metadata| metadata.len());
    let mut response = get(agent, url, have)?;
    let status = response.status().as_u16();
    let resumed = match status {
        206 => true,
        200 => false,
        // The partial file was whole already.
        416 if have > 0 => return accept(partial, path, sha256),
        401 | 403 => bail!(Error::new(
            ErrorCode::Denied,
            format!("{url} answered {status}: set HF_TOKEN to a token that may read it")
        )),
        404 => bail!(Error::new(ErrorCode::NotFound, format!("{url} answered 404"))),
        _ => bail!(Error::unavailable(format!("{url} answered {status}"))),
    };
    let expected = sha256.map(str::to_owned).or_else(|| {
        response
            .extensions()
            .get::<LinkedHash>()
            .map(|hash| hash.0.clone())
    });
    if !resumed
        && expected.is_some()
        && let Some(pulled) = present(path, expected.as_deref())?
    {
        return Ok(pulled);
    }
    let start = if resumed { have } else { 0 };
    let rest: Option<u64> =
        header(response.headers(), "content-length").and_then(|length| length.parse().ok());
    let mut file = OpenOptions::new()
        .create(true)
        .write(true)
        .append(resumed)
        .truncate(!resumed)
        .open(partial)?;
    let bar = output::byte_bar(&path.display().to_string(), rest.map(|rest| start + rest));
    bar.set_position(start);
    let received = save(&mut response.body_mut().as_reader(), &mut file, &bar)?;
    bar.finish_and_clear();
    if rest.is_some_and(|rest| rest != received) {
        bail!(Error::unavailable(format!(
            "{url} ended after {received} bytes; run the same command again to resume"
        )));
    }
    accept(partial, path, expected.as_deref())
}

fn save(from: &mut impl Read, to: &mut fs::File, bar: &indicatif::ProgressBar) -> anyhow::Result<u64> {
    let mut buffer = vec![0; 1 << 18];
    let mut total = 0;
    loop {
        let read = from
            .read(&mut buffer)
            .context("the download broke off; run the same command again to resume")?;
        if read == 0 {
            to.sync_all()?;
            return Ok(total);
        }
        to.write_all(&buffer[..read])?;
        total += read as u64;
        bar.inc(read as u64);
    }
}

#[cfg(test)]
mod tests;
