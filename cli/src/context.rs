//! `perigee context`: clusters by name, and which one a command is for.
//!
//! What the command line says goes over the environment, that over the context, and that over the default. A router that is named
//! without a context is another cluster than the current one, so nothing of the current context is shown to it.

mod file;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use node::{ApiKey, tls};
use serde_json::{Value, json};
use types::{Error, ErrorCode};

use crate::output::{self, Columns, Format, View, or_dash};
use crate::reach::{self, Router};
use file::{Context, Contexts};

/// Where `perigee up` listens.
const DEFAULT_ROUTER: &str = "127.0.0.1:50051";
const ROUTER_VARIABLE: &str = "PERIGEE_ROUTER";

/// Which cluster a command is for, and as whom.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ClusterFlags {
    /// gRPC address of the router that client commands talk to; unless given that of `PERIGEE_ROUTER`, then the context's, then
    /// `127.0.0.1:50051`.
    #[arg(long, global = true, value_name = "ADDRESS")]
    router: Option<String>,
    /// Key that the router asks for.
    #[arg(
        long,
        global = true,
        env = "PERIGEE_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
        value_parser = |key: &str| ApiKey::new(key)
    )]
    pub(crate) api_key: Option<ApiKey>,
    /// Cluster by name (`perigee context list`) in place of the current one.
    #[arg(long, global = true, env = "PERIGEE_CONTEXT", value_name = "NAME")]
    context: Option<String>,
}

/// The cluster that a command is for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    /// Address of its router.
    pub(crate) address: String,
    /// What to show to it.
    pub(crate) key: Option<ApiKey>,
    /// Certificates of the context.
    tls: tls::Config,
    /// Model that is meant where none is named; empty leaves that to the router.
    model: String,
}

impl ClusterFlags {
    /// Puts flags, environment and contexts together.
    ///
    /// # Errors
    ///
    /// The file of contexts or the context's key cannot be read, or there is no context of that name.
    pub(crate) fn target(&self) -> anyhow::Result<Target> {
        let contexts = match file::path() {
            Some(path) => match Contexts::load(&path) {
                // A home that this user may not enter, as in many containers, holds no contexts for it.
                Err(error) if error.code == ErrorCode::Denied && self.context.is_none() => {
                    Contexts::default()
                }
                loaded => loaded?,
            },
            None => Contexts::default(),
        };
        let variable = std::env::var(ROUTER_VARIABLE).ok();
        let variable = variable.filter(|address| !address.is_empty());
        let router = self.router.as_deref().or(variable.as_deref());
        let context = chosen(&contexts, self.context.as_deref(), router)?;
        let key = match (&self.api_key, context.api_key_file.as_str()) {
            (Some(key), _) => Some(key.clone()),
            (None, "") => None,
            (None, file) => Some(file::read_key(Path::new(file))?),
        };
        let address = router.map_or(context.router, str::to_owned);
        Ok(Target {
            address: if address.is_empty() {
                DEFAULT_ROUTER.to_owned()
            } else {
                address
            },
            key,
            tls: context.tls.into(),
            model: context.model,
        })
    }
}

/// The context that counts: the one that is named, or else the current one unless a router is named.
fn chosen(contexts: &Contexts, named: Option<&str>, router: Option<&str>) -> Result<Context, Error> {
    match (named, router) {
        (Some(name), _) => Ok(contexts.get(name)?.clone()),
        (None, Some(_)) => Ok(Context::default()),
        (None, None) if contexts.current.is_empty() => Ok(Context::default()),
        (None, None) => Ok(contexts.get(&contexts.current)?.clone()),
    }
}

impl Target {
    /// The way to its router.
    ///
    /// # Errors
    ///
    /// The settings or the certificates cannot be used.
    pub(crate) fn router(&self) -> anyhow::Result<Router> {
        let tls = reach::load_tls(&self.tls()?)?;
        let router = Router::with_tls(&self.address, tls, self.key.as_ref());
        Ok(router.with_model(&self.model))
    }

    /// What to connect with: `[tls]` of this environment, or else the context's.
    pub(crate) fn tls(&self) -> anyhow::Result<tls::Config> {
        Ok(self.tls_or(reach::tls_settings()?))
    }

    /// These settings, or those of the context where they name no files.
    pub(crate) fn tls_or(&self, settings: tls::Config) -> tls::Config {
        match settings.is_on() {
            true => settings,
            false => self.tls.clone(),
        }
    }
}

/// `perigee context`.
#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List the clusters that have names
    List,
    /// Make one of them the current one
    Use {
        /// Its name.
        name: String,
    },
    /// Show one of them
    Show {
        /// Its name; the current one unless given.
        name: Option<String>,
    },
    /// Name a cluster, or change what is kept of one
    Set(SetArgs),
    /// Forget one of them
    Delete {
        /// Its name.
        name: String,
    },
}

/// Flags of `context set`. What is not given stays; an empty value removes it. The address comes from `--router`.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SetArgs {
    /// Its name.
    name: String,
    /// File that holds the API key. The key itself is not kept with the context.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// PEM file of the authorities that sign the cluster's certificates.
    #[arg(long, value_name = "FILE")]
    tls_authority: Option<PathBuf>,
    /// PEM file of the certificate to show.
    #[arg(long, value_name = "FILE")]
    tls_certificate: Option<PathBuf>,
    /// PEM file of its private key.
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Name that the certificates of all members bear.
    #[arg(long, value_name = "NAME")]
    tls_name: Option<String>,
    /// Model that `chat` and `generate` ask for where none is named.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Make it the current one, too.
    #[arg(long = "use")]
    make_current: bool,
}

/// Runs one of the commands.
pub(crate) fn run(command: ContextCommand, flags: &ClusterFlags, format: Format) -> anyhow::Result<()> {
    let path = file::path().ok_or_else(|| {
        let message = "neither PERIGEE_CONTEXTS, XDG_CONFIG_HOME nor HOME says where contexts are kept";
        Error::invalid("contexts", message)
    })?;
    let mut contexts = Contexts::load(&path)?;
    match command {
        ContextCommand::List => format.print(&list_view(&contexts)),
        ContextCommand::Show { name } => {
            let name = name.as_deref().or(flags.context.as_deref());
            let name = name.unwrap_or(&contexts.current);
            if name.is_empty() {
                let message = "no context is current: perigee context use NAME makes one so";
                return Err(Error::new(ErrorCode::NotFound, message).into());
            }
            format.print(&show_view(name, contexts.get(name)?, &contexts))
        }
        ContextCommand::Use { name } => {
            contexts.get(&name)?;
            contexts.current.clone_from(&name);
            contexts.save(&path)?;
            format.print(&done(&name, "is the current context"))
        }
        ContextCommand::Set(set) => {
            file::check_name(&set.name)?;
            let context = contexts.contexts.entry(set.name.clone()).or_default();
            change(context, &set, flags.router.as_deref())?;
            if set.make_current {
                contexts.current.clone_from(&set.name);
            }
            contexts.save(&path)?;
            format.print(&done(&set.name, "is set"))
        }
        ContextCommand::Delete { name } => {
            contexts.get(&name)?;
            contexts.contexts.remove(&name);
            if contexts.current == name {
                contexts.current.clear();
            }
            contexts.save(&path)?;
            format.print(&done(&name, "is deleted"))
        }
    }
}

fn change(context: &mut Context, set: &SetArgs, router: Option<&str>) -> anyhow::Result<()> {
    let SetArgs {
        name: _,
        api_key_file,
        tls_authority,
        tls_certificate,
        tls_key,
        tls_name,
        model,
        make_current: _,
    } = set;
    let tls = &mut context.tls;
    for (kept, given) in [
        (&mut context.api_key_file, api_key_file),
        (&mut tls.authority, tls_authority),
        (&mut tls.certificate, tls_certificate),
        (&mut tls.key, tls_key),
    ] {
        match given {
            None => {}
            Some(path) if path.as_os_str().is_empty() => kept.clear(),
            // Commands run in other folders.
            Some(path) => *kept = std::path::absolute(path)?.display().to_string(),
        }
    }
    for (kept, given) in [
        (&mut context.router, router),
        (&mut tls.name, tls_name.as_deref()),
        (&mut context.model, model.as_deref()),
    ] {
        if let Some(given) = given {
            given.clone_into(kept);
        }
    }
    Ok(())
}

fn done(name: &str, what: &str) -> View {
    View::line(json!({ "context": name }), format!("{name} {what}")).named([name])
}

fn to_json(name: &str, context: &Context, contexts: &Contexts) -> Value {
    json!({
        "name": name,
        "current": name == contexts.current,
        "router": context.router,
        "api_key_file": context.api_key_file,
        "tls": context.tls,
        "model": context.model,
    })
}

fn list_view(contexts: &Contexts) -> View {
    let documents = contexts.contexts.iter();
    let documents: Vec<Value> = documents
        .map(|(name, context)| to_json(name, context, contexts))
        .collect();
    let view = View::new(json!({ "contexts": documents }), |wide| {
        let columns = [
            ("CURRENT", false),
            ("NAME", false),
            ("ROUTER", false),
            ("TLS", false),
            ("MODEL", false),
            ("API KEY FILE", true),
            ("AUTHORITY", true),
            ("CERTIFICATE", true),
        ];
        let mut table = Columns::new(wide, &columns);
        for (name, context) in &contexts.contexts {
            table.row([
                if *name == contexts.current { "*" } else { "" }.to_owned(),
                name.clone(),
                or_dash(&context.router),
                if context.tls.authority.is_empty() {
                    "no"
                } else {
                    "yes"
                }
                .to_owned(),
                or_dash(&context.model),
                or_dash(&context.api_key_file),
                or_dash(&context.tls.authority),
                or_dash(&context.tls.certificate),
            ]);
        }
        table.text()
    });
    view.named(contexts.contexts.keys())
}

fn show_view(name: &str, context: &Context, contexts: &Contexts) -> View {
    let view = View::new(to_json(name, context, contexts), |_| {
        let mut table = output::table(&["CONTEXT", name]);
        for (what, value) in [
            ("router", &context.router),
            ("api key file", &context.api_key_file),
            ("tls authority", &context.tls.authority),
            ("tls certificate", &context.tls.certificate),
            ("tls key", &context.tls.key),
            ("tls name", &context.tls.name),
            ("model", &context.model),
        ] {
            table.add_row([what, &or_dash(value)]);
        }
        output::table_text(&table)
    });
    view.named([name])
}

#[cfg(test)]
mod tests;
