//! Writes the tiny model of a family: `tiny_model FAMILY [fp8] DIRECTORY`, or to a file if its name ends in `.gguf`.
//! `scripts/reference_families.py` compares it with `transformers`.

use engine::family::FAMILIES;
use engine::fixture::{TinyModel, write_tiny_gguf, write_tiny_hf};
use engine::tensor::TensorFormat;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, kind @ .., path] = arguments.as_slice() else {
        return Err("usage: tiny_model FAMILY [fp8] PATH".into());
    };
    let family = FAMILIES.iter().find(|family| family.name == name);
    let mut model = TinyModel::of(family.ok_or("no such family")?.name);
    if kind == ["fp8"] {
        model.format = TensorFormat::F8E4M3;
    }
    if path.ends_with(".gguf") {
        write_tiny_gguf(path, &model)?;
    } else {
        write_tiny_hf(path, &model, 1)?;
    }
    Ok(())
}
