//! What single tenants may have of a node's pool: `[store.tenants.NAME]`.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use kv_store::TenantConfig;
use kv_store::table::LIMITED_MAX;
use node::config::ByteSize;
use serde::{Deserialize, Serialize};
use types::Error;

use super::StoreSettings;

/// Longest name of a tenant, as requests may give it.
const NAME_BYTES_MAX: usize = 256;

/// One tenant's limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct TenantSettings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes_max: Option<ByteSize>,
    pub(crate) weight: NonZeroU32,
}

impl Default for TenantSettings {
    fn default() -> Self {
        Self::of(TenantConfig::default())
    }
}

impl TenantSettings {
    fn of(config: TenantConfig) -> Self {
        let TenantConfig { bytes_max, weight } = config;
        Self {
            bytes_max: bytes_max.map(ByteSize),
            weight,
        }
    }

    pub(super) fn of_all(configs: BTreeMap<String, TenantConfig>) -> BTreeMap<String, Self> {
        let each = configs.into_iter();
        each.map(|(name, config)| (name, Self::of(config))).collect()
    }

    pub(super) fn config_of_all(settings: &BTreeMap<String, Self>) -> BTreeMap<String, TenantConfig> {
        let config = |tenant: &Self| TenantConfig {
            bytes_max: tenant.bytes_max.map(ByteSize::get),
            weight: tenant.weight,
        };
        let each = settings.iter();
        each.map(|(name, tenant)| (name.clone(), config(tenant)))
            .collect()
    }
}

impl StoreSettings {
    /// Checks what the types do not say.
    pub(super) fn validate(&self) -> Result<(), Error> {
        if self.tenants.len() > LIMITED_MAX {
            return Err(Error::invalid(
                "store.tenants",
                format!(
                    "store.tenants names {} tenants, but at most {LIMITED_MAX} can have limits of their own",
                    self.tenants.len()
                ),
            ));
        }
        if let Some(name) = self.tenants.keys().find(|name| name.len() > NAME_BYTES_MAX) {
            return Err(Error::invalid(
                "store.tenants",
                format!(
                    "store.tenants has a name of {} bytes, but requests can name tenants with at most {NAME_BYTES_MAX}",
                    name.len()
                ),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use node::config::{Layers, layer};

    use super::super::Settings;
    use super::*;

    fn of(file: &str, flags: &[(&str, &str)]) -> Result<kv_store::Config, Error> {
        let flags = flags.iter();
        let loaded = layer::<Settings>(&Layers {
            file: Some(("perigee.toml", file)),
            environment: Vec::new(),
            flags: flags
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        });
        let loaded = loaded.map_err(|error| Error::new(error.code(), error.to_string()))?;
        assert!(loaded.unknown_keys.is_empty(), "{:?}", loaded.unknown_keys);
        loaded.value.validate()?;
        Ok(loaded.value.store.config())
    }

    #[test]
    fn limits_come_from_file_and_flags() {
        let config = of(
            "[store]\ntenant_bytes_max = \"1GiB\"\n[store.tenants.acme]\nbytes_max = \"4GiB\"\nweight = 3\n\
             [store.tenants.\"\"]\nbytes_max = \"0B\"\n",
            &[("store.tenants.beta.weight", "2")],
        )
        .expect("valid");
        let tenant = |name: &str| {
            let tenant = &config.tenants[name];
            (tenant.bytes_max, tenant.weight.get())
        };
        assert_eq!(config.tenant_bytes_max, 1 << 30);
        assert_eq!(tenant("acme"), (Some(4 << 30), 3));
        assert_eq!(tenant("beta"), (None, 2));
        assert_eq!(tenant(""), (Some(0), 1));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (file, says) in [
            ("[store.tenants.acme]\nweight = 0", "nonzero"),
            ("[store.tenants.acme]\nbytes_max = \"much\"", "much"),
            (
                &format!("[store.tenants.{}]\nweight = 2", "x".repeat(257)),
                "257 bytes",
            ),
        ] {
            let error = of(file, &[]).expect_err(file);
            assert_eq!(error.code, types::ErrorCode::Invalid, "{file}");
            assert!(error.message.contains(says), "{file}: {}", error.message);
        }
    }
}
