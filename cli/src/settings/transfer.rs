//! What moves KV between nodes, and the settings of UCX.

use std::collections::BTreeMap;
use std::path::Path;
use std::time;

use node::config::Duration;
use serde::{Deserialize, Serialize};
use transfer::ucx;
use types::Error;

/// A thread that looks for work for longer than this burns a core for nothing.
const SPIN_MAX: time::Duration = time::Duration::from_millis(10);
/// What UCX's environment variables begin with.
const UCX_PREFIX: &str = "UCX_";

/// `[transfer]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct TransferSettings {
    pub(crate) transport: Transport,
    pub(crate) ucx_library: String,
    pub(crate) ucx_tls: String,
    pub(crate) ucx_net_devices: String,
    pub(crate) ucx_max_rma_rails: u32,
    pub(crate) ucx_spin: Duration,
    pub(crate) ucx: BTreeMap<String, String>,
}

/// What moves KV between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Transport {
    /// UCX where it offers more than TCP, built-in TCP elsewhere.
    Auto,
    /// Built-in TCP only.
    Tcp,
    /// UCX only.
    Ucx,
}

impl Transport {
    /// Its name in a configuration and on the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Ucx => "ucx",
        }
    }
}

impl Default for TransferSettings {
    fn default() -> Self {
        let ucx::Config {
            choice,
            library,
            settings,
            spin,
        } = ucx::Config::default();
        Self {
            transport: match choice {
                ucx::Choice::Auto => Transport::Auto,
                ucx::Choice::Tcp => Transport::Tcp,
                ucx::Choice::Ucx => Transport::Ucx,
            },
            ucx_library: library.map_or_else(String::new, |path| path.display().to_string()),
            ucx_tls: String::new(),
            ucx_net_devices: String::new(),
            ucx_max_rma_rails: 0,
            ucx_spin: spin.into(),
            ucx: settings,
        }
    }
}

impl TransferSettings {
    /// Checks what the types do not say.
    pub(super) fn validate(&self) -> Result<(), Error> {
        if self.ucx_spin.get() > SPIN_MAX {
            return Err(Error::invalid(
                "transfer.ucx_spin",
                format!(
                    "transfer.ucx_spin is {}, but at most {} make sense",
                    self.ucx_spin,
                    Duration::from(SPIN_MAX)
                ),
            ));
        }
        for (key, value) in self.named().into_iter().map(|(key, _, value)| (key, value)) {
            printable(&format!("transfer.{key}"), &value)?;
        }
        for (key, value) in &self.ucx {
            self.validate_ucx(key, value)?;
        }
        Ok(())
    }

    /// Checks what a process on this machine would load. A router loads nothing, and may share its file with those that do.
    pub(crate) fn check_library(&self) -> Result<(), Error> {
        let library = &self.ucx_library;
        // A bare name is searched by the system's loader, as only it can.
        if library.contains('/') && self.transport != Transport::Tcp && !Path::new(library).is_file() {
            return Err(Error::invalid(
                "transfer.ucx_library",
                format!("transfer.ucx_library is {library}, but there is no such file"),
            ));
        }
        Ok(())
    }

    fn validate_ucx(&self, key: &str, value: &str) -> Result<(), Error> {
        let parameter = format!("transfer.ucx.{key}");
        let name = key.to_ascii_uppercase();
        if let Some(rest) = name.strip_prefix(UCX_PREFIX) {
            return Err(Error::invalid(
                parameter,
                format!("transfer.ucx.{key} is to be written without {UCX_PREFIX}: {rest}"),
            ));
        }
        let known = |digit: char| digit.is_ascii_alphanumeric() || digit == '_';
        if name.is_empty() || !name.chars().all(known) {
            return Err(Error::invalid(
                parameter,
                format!("transfer.ucx.{key} is no name of a UCX setting, such as MAX_RNDV_RAILS"),
            ));
        }
        if let Some((own, ..)) = self.named().into_iter().find(|(_, ucx, _)| *ucx == name) {
            return Err(Error::invalid(
                parameter,
                format!("transfer.ucx.{key} and transfer.{own} are the same setting: give one of them"),
            ));
        }
        printable(&parameter, value)
    }

    /// The settings of UCX that have a key of their own and are given: key, name in UCX, value.
    fn named(&self) -> Vec<(&'static str, &'static str, String)> {
        let rails = match self.ucx_max_rma_rails {
            0 => String::new(),
            rails => rails.to_string(),
        };
        let all = [
            ("ucx_tls", "TLS", self.ucx_tls.clone()),
            ("ucx_net_devices", "NET_DEVICES", self.ucx_net_devices.clone()),
            ("ucx_max_rma_rails", "MAX_RMA_RAILS", rails),
        ];
        all.into_iter()
            .filter(|(_, _, value)| !value.is_empty())
            .collect()
    }

    /// What the transport takes.
    pub(crate) fn ucx_config(&self) -> ucx::Config {
        let named = self.named().into_iter();
        let named = named.map(|(_, name, value)| (name.to_owned(), value));
        // Variables of the environment reach the configuration in small letters.
        let free = self.ucx.iter();
        let free = free.map(|(key, value)| (key.to_ascii_uppercase(), value.clone()));
        ucx::Config {
            choice: match self.transport {
                Transport::Auto => ucx::Choice::Auto,
                Transport::Tcp => ucx::Choice::Tcp,
                Transport::Ucx => ucx::Choice::Ucx,
            },
            library: (!self.ucx_library.is_empty()).then(|| self.ucx_library.clone().into()),
            settings: named.chain(free).collect(),
            spin: self.ucx_spin.get(),
        }
    }
}

/// Values go to a C library as they are.
fn printable(parameter: &str, value: &str) -> Result<(), Error> {
    if value.chars().any(|character| character.is_control()) {
        return Err(Error::invalid(
            parameter,
            format!("{parameter} is {value:?}, but a setting of UCX is one printable line"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use node::config::{Layers, layer};

    use super::super::Settings;
    use super::*;

    fn of(
        file: &str,
        environment: &[(&str, &str)],
        flags: &[(&str, &str)],
    ) -> Result<TransferSettings, Error> {
        let own = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            pairs
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let loaded = layer::<Settings>(&Layers {
            file: Some(("perigee.toml", file)),
            environment: own(environment),
            flags: own(flags),
        });
        let loaded = loaded.map_err(|error| Error::new(error.code(), error.to_string()))?;
        assert!(loaded.unknown_keys.is_empty(), "{:?}", loaded.unknown_keys);
        loaded.value.transfer.validate()?;
        loaded.value.transfer.check_library()?;
        Ok(loaded.value.transfer)
    }

    #[test]
    fn nothing_set_is_the_transports_own_default() {
        assert_eq!(TransferSettings::default().ucx_config(), ucx::Config::default());
    }

    #[test]
    fn settings_of_ucx_come_from_file_environment_and_flags() {
        let settings = of(
            "[transfer]\ntransport = \"ucx\"\nucx_tls = \"rc,sm\"\nucx_spin = \"50us\"\n[transfer.ucx]\nMAX_RNDV_RAILS = \"2\"\n",
            &[("PERIGEE_TRANSFER__UCX__IB_GID_INDEX", "3")],
            &[
                ("transfer.ucx_max_rma_rails", "4"),
                ("transfer.ucx.LOG_LEVEL", "info"),
            ],
        );
        let config = settings.expect("valid").ucx_config();
        assert_eq!(config.choice, ucx::Choice::Ucx);
        assert_eq!(config.spin, time::Duration::from_micros(50));
        let set: Vec<(&str, &str)> = config
            .settings
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
            .collect();
        assert_eq!(
            set,
            [
                ("IB_GID_INDEX", "3"),
                ("LOG_LEVEL", "info"),
                ("MAX_RMA_RAILS", "4"),
                ("MAX_RNDV_RAILS", "2"),
                ("TLS", "rc,sm"),
            ]
        );
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_do() {
        for (file, says) in [
            ("[transfer]\ntransport = \"rdma\"", "auto"),
            (
                "[transfer]\nucx_library = \"/nowhere/libucp.so.0\"",
                "no such file",
            ),
            ("[transfer]\nucx_spin = \"1s\"", "at most 10ms"),
            ("[transfer.ucx]\nUCX_TLS = \"rc\"", "without UCX_: TLS"),
            (
                "[transfer.ucx]\n\"max rails\" = \"2\"",
                "no name of a UCX setting",
            ),
            (
                "[transfer]\nucx_tls = \"rc\"\n[transfer.ucx]\ntls = \"tcp\"",
                "transfer.ucx_tls are the same setting",
            ),
            ("[transfer]\nucx_net_devices = \"a\\nb\"", "one printable line"),
        ] {
            let error = of(file, &[], &[]).expect_err(file);
            assert_eq!(error.code, types::ErrorCode::Invalid, "{file}");
            assert!(error.message.contains(says), "{file}: {}", error.message);
        }
        let unused = "[transfer]\ntransport = \"tcp\"\nucx_library = \"/nowhere/libucp.so.0\"";
        assert!(
            of(unused, &[], &[]).is_ok(),
            "a library that is not loaded need not exist"
        );
    }
}
