//! Compiles the contract without `protoc`, and keeps the descriptors for reflection.

use std::path::PathBuf;

use prost::Message;

const FILES: [&str; 12] = [
    "perigee/v1/cache.proto",
    "perigee/v1/common.proto",
    "perigee/v1/decode.proto",
    "perigee/v1/inference.proto",
    "perigee/v1/node.proto",
    "perigee/v1/prefill.proto",
    "perigee/v1/registry.proto",
    "perigee/v1/requests.proto",
    "perigee/v1/routing.proto",
    "perigee/v1/store.proto",
    "perigee/v1/tenants.proto",
    "perigee/v1/transfer.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=perigee");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("perigee.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
