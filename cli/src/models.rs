//! `perigee model list`: the models of the catalogue, and those that the cluster serves.

use std::time::Duration;

use client::NodeStatus;
use proto::v1::ModelInfo;
use serde_json::json;
use types::{Error, Role};

use crate::output::{self, Columns, Format, View, Watch, or_dash};
use crate::pull::catalogue;
use crate::reach::Router;

/// A router that runs answers at once, and without one the catalogue is of use, too.
const DEADLINE: Duration = Duration::from_secs(2);

/// Lists both. Without a router that answers, the catalogue alone.
pub(crate) async fn list(watch: Watch, router: &Router, format: Format) -> anyhow::Result<()> {
    let look = async || {
        let served = ask(router).await;
        if let Err(error) = &served {
            eprintln!("perigee: only the catalogue is listed, since no router answers: {error}");
        }
        Ok(view(catalogue::MODELS, served.ok().as_deref()))
    };
    watch.show(format, look).await
}

async fn ask(router: &Router) -> Result<Vec<Served>, Error> {
    let inference = router.inference()?.with_deadline(DEADLINE);
    let (models, status) = tokio::try_join!(inference.list_models(), inference.cluster_status())?;
    Ok(served(&models, &status.nodes))
}

/// A model that the cluster serves.
#[derive(Debug, serde::Serialize)]
struct Served {
    name: String,
    context_tokens_max: u64,
    /// `None` where no node with a pool is known.
    block_tokens: Option<usize>,
    model_digest: String,
    nodes: Vec<String>,
}

fn served(models: &[ModelInfo], nodes: &[NodeStatus]) -> Vec<Served> {
    let of_model = |model: &ModelInfo| {
        let records = nodes.iter().map(|node| &node.record);
        let records = records.filter(|record| record.role != Role::Router && record.model == model.name);
        let block_tokens = records.clone().find_map(|record| {
            let space = record.kv_space.as_ref();
            space.map(|space| space.layout.block_tokens)
        });
        Served {
            name: model.name.clone(),
            context_tokens_max: model.context_tokens_max,
            block_tokens,
            model_digest: model.model_digest.clone(),
            nodes: records.map(|record| record.id.to_string()).collect(),
        }
    };
    models.iter().map(of_model).collect()
}

fn view(catalogue: &[catalogue::Model], served: Option<&[Served]>) -> View {
    let document = json!({ "catalogue": catalogue, "served": served });
    let view = View::new(document, |wide| {
        let served = served.map(|served| format!("\n{}", served_table(served, wide)));
        format!(
            "{}{}",
            catalogue_table(catalogue, wide),
            served.unwrap_or_default()
        )
    });
    let names = catalogue.iter().map(|model| model.name);
    view.named(names.chain(served.unwrap_or_default().iter().map(|model| model.name.as_str())))
}

fn catalogue_table(catalogue: &[catalogue::Model], wide: bool) -> String {
    let columns = [
        ("NAME", false),
        ("SIZE", false),
        ("SOURCE", false),
        ("LICENCE", false),
        ("SHA256", true),
    ];
    let mut table = Columns::new(wide, &columns);
    for model in catalogue {
        table.row([
            model.name.to_owned(),
            output::bytes(model.bytes),
            format!("PyPI {} {}", model.package, model.version),
            model.licence.to_owned(),
            model.sha256.to_owned(),
        ]);
    }
    table.text()
}

fn served_table(served: &[Served], wide: bool) -> String {
    let columns = [
        ("SERVED", false),
        ("CONTEXT", false),
        ("BLOCK TOKENS", false),
        ("NODES", false),
        ("DIGEST", true),
    ];
    let mut table = Columns::new(wide, &columns);
    for model in served {
        table.row([
            model.name.clone(),
            model.context_tokens_max.to_string(),
            model
                .block_tokens
                .map_or_else(|| "-".to_owned(), |tokens| tokens.to_string()),
            or_dash(&model.nodes.join(", ")),
            or_dash(&model.model_digest),
        ]);
    }
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node_admin::tests::node;
    use crate::output::golden;

    #[test]
    fn models_are_listed_with_the_nodes_that_serve_them() {
        let info = |name: &str| ModelInfo {
            name: name.into(),
            context_tokens_max: 2048,
            model_digest: "00aa".into(),
        };
        let nodes = [
            node("router-0", Role::Router),
            node("prefill-0", Role::Prefill),
            node("decode-0", Role::Decode),
        ];
        let served = served(&[info("tiny"), info("other")], &nodes);
        assert_eq!(served[0].nodes, ["prefill-0", "decode-0"]);
        assert!(served[1].nodes.is_empty());
        golden::check("model-list", &view(catalogue::MODELS, Some(&served)));
        golden::check("model-list-without-router", &view(catalogue::MODELS, None));
    }
}
