//! Every setting of every role: the raw form that file, environment and flags fill, its checks, and its reference.
//!
//! Defaults come from the roles' own `Config::default`, which gives the reasons. `docs/configuration.md` is printed from here
//! (`perigee config --markdown`) and tested against it.

mod diff;
mod reference;
mod sections;
mod tenants;
mod transfer;

use anyhow::bail;
use node::config::Loaded;
use serde::{Deserialize, Serialize};
use types::Error;

use crate::arguments::{ConfigArgs, ConfigCommand, Precision, RoleArgs, SettingFlags, ViewArgs};
use crate::output::{Format, View};
pub(crate) use diff::redact;
pub(crate) use sections::{
    DecodeSettings, KvSettings, LogSettings, ModelSettings, NodeSettings, PrefillSettings, RegistrySettings,
    StoreSettings, TelemetrySettings,
};
pub(crate) use transfer::{TransferSettings, Transport};

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Settings {
    pub(crate) node: NodeSettings,
    pub(crate) registry: RegistrySettings,
    pub(crate) tls: node::tls::Config,
    pub(crate) model: ModelSettings,
    pub(crate) kv: KvSettings,
    pub(crate) transfer: TransferSettings,
    pub(crate) router: router::Config,
    pub(crate) prefill: PrefillSettings,
    pub(crate) decode: DecodeSettings,
    pub(crate) store: StoreSettings,
    pub(crate) log: LogSettings,
    pub(crate) telemetry: TelemetrySettings,
}

/// Puts file, environment and flags together, for a command that is no role.
pub(crate) fn load_for_command(flags: &SettingFlags) -> anyhow::Result<Loaded<Settings>> {
    let overrides = setting_overrides(flags)?;
    Ok(node::config::load(flags.config.as_deref(), overrides)?)
}

/// Puts file, environment and flags together.
pub(crate) fn load(flags: &RoleArgs) -> anyhow::Result<Loaded<Settings>> {
    let mut overrides = setting_overrides(&flags.settings)?;
    let RoleArgs {
        settings: _,
        id,
        registry,
        listen,
        grpc_port,
        http_port,
        check_config: _,
        exit_with_parent: _,
    } = flags;
    let mut set =
        |key: &str, value: Option<String>| overrides.extend(value.map(|value| (key.to_owned(), value)));
    set("node.id", id.clone());
    set("registry.url", registry.clone());
    set("node.listen", listen.map(|listen| listen.to_string()));
    set("node.grpc_port", grpc_port.map(|port| port.to_string()));
    set("node.http_port", http_port.map(|port| port.to_string()));
    Ok(node::config::load(flags.settings.config.as_deref(), overrides)?)
}

fn setting_overrides(flags: &SettingFlags) -> anyhow::Result<Vec<(String, String)>> {
    let SettingFlags {
        config: _,
        model,
        model_name,
        precision,
        threads,
        kv_memory,
        block_tokens,
        transport,
        set,
    } = flags;
    let precision = precision.map(|precision| match precision {
        Precision::Exact => "exact".to_owned(),
        Precision::Fast => "fast".to_owned(),
    });
    let named = [
        (
            "model.path",
            model.as_ref().map(|path| path.display().to_string()),
        ),
        ("model.name", model_name.clone()),
        ("model.precision", precision),
        ("model.threads", threads.map(|threads| threads.to_string())),
        ("kv.memory", kv_memory.clone()),
        ("kv.block_tokens", block_tokens.map(|tokens| tokens.to_string())),
        (
            "transfer.transport",
            transport.map(|transport| transport.as_str().to_owned()),
        ),
    ];
    let mut overrides: Vec<(String, String)> = named
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect();
    for setting in set {
        let Some((key, value)) = setting.split_once('=') else {
            bail!(Error::invalid(
                "set",
                format!("--set {setting} is not of the form SECTION.KEY=VALUE")
            ));
        };
        overrides.push((key.trim().to_owned(), value.trim().to_owned()));
    }
    Ok(overrides)
}

impl Settings {
    /// Checks what the types do not say, for every role.
    ///
    /// # Errors
    ///
    /// The first setting that cannot be used, by its key.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        self.node.validate()?;
        self.tls.validate_server()?;
        self.registry.validate()?;
        self.kv.validate()?;
        self.transfer.validate()?;
        self.store.validate()?;
        self.router
            .validate()
            .map_err(|error| Error::invalid("router", error.to_string()))?;
        self.telemetry.validate()?;
        self.prefill.config(self.model.engine_threads()).validate()?;
        self.decode.config(self.model.engine_threads()).validate()
    }
}

/// Runs `perigee config`, which is `config view` where nothing else is said.
pub(crate) fn run(arguments: &ConfigArgs, format: Format) -> anyhow::Result<()> {
    match &arguments.command {
        None => show(&arguments.view, format),
        Some(ConfigCommand::View(flags)) => show(flags, format),
        Some(ConfigCommand::Diff { settings, other }) => diff::run(settings, other.as_deref(), format),
    }
}

/// Prints the settings that a role would run with, or their reference.
fn show(flags: &ViewArgs, format: Format) -> anyhow::Result<()> {
    if flags.markdown {
        print!("{}", reference::markdown()?);
        return Ok(());
    }
    let loaded = load_for_command(&flags.settings)?;
    warn_of_unknown(&loaded);
    loaded.value.validate()?;
    let text = toml::to_string(&loaded.value)?;
    format.print(&View::new(serde_json::to_value(&loaded.value)?, |_| text.clone()))
}

/// Says which keys nobody reads.
pub(crate) fn warn_of_unknown(loaded: &Loaded<Settings>) {
    for key in &loaded.unknown_keys {
        eprintln!("perigee: unknown setting: {key}");
    }
}
