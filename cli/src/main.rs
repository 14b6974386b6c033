//! The one binary: all roles, `up`, and the cluster admin commands.
//!
//! Data go to stdout, everything else to stderr. The exit code says what kind of failure it was
//! (`types::ErrorCode::exit`, after `sysexits.h`), or 10 where `perigee check` or `perigee doctor` found something wrong.

mod arguments;
mod bench;
mod cache;
mod chat;
mod check;
mod context;
mod debug;
mod demo;
mod door;
mod generate;
mod key;
mod manual;
mod models;
mod node_admin;
mod nodes;
mod output;
mod pull;
mod reach;
mod requests;
mod roles;
mod route;
mod settings;
mod sim;
mod status;
mod tenants;
mod top;
mod transfers;
mod up;

use std::process::ExitCode;

use clap::Parser;
use types::ErrorCode;

use arguments::{Arguments, Command, ModelCommand, TransferCommand};
use node_admin::flip;

/// A router makes and drops hundreds of small values per request, in whichever thread: that is what this allocator is for.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Before there are threads. That there are none is a property of this function, so the result says nothing.
    transfer::ucx::prepare_process();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // `--help` and `--version` are no failures.
            let code = if error.use_stderr() {
                ErrorCode::Invalid.exit()
            } else {
                0
            };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads what is printed, such as `head`, has seen enough.
        Err(error) if is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("perigee: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn is_closed(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The exit code of the first cause that knows its kind.
fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<check::Unhealthy>() {
        return check::UNHEALTHY_EXIT;
    }
    let known = error.chain().find_map(|cause| {
        let typed = cause.downcast_ref::<types::Error>().map(|error| error.code);
        typed.or_else(|| {
            cause
                .downcast_ref::<node::config::ConfigError>()
                .map(node::config::ConfigError::code)
        })
    });
    known.unwrap_or(ErrorCode::Internal).exit()
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments {
        output,
        cluster,
        command,
    } = arguments;
    let key = cluster.api_key.as_ref();
    let target = || cluster.target();
    let router = || target()?.router();
    match command {
        Command::Router(flags) => roles::run(types::Role::Router, &flags),
        Command::Prefill(flags) => roles::run(types::Role::Prefill, &flags),
        Command::Decode(flags) => roles::run(types::Role::Decode, &flags),
        Command::Store(flags) => roles::run(types::Role::Store, &flags),
        Command::Up(flags) => block_on(up::run(flags, key, output)),
        Command::Demo(flags) => block_on(demo::run(flags, key, output)),
        Command::Chat(flags) => block_on(chat::run(flags, &router()?, output)),
        Command::Generate(flags) => block_on(generate::run(flags, &router()?, output)),
        Command::Bench(flags) => block_on(bench::run(flags, &router()?, output)),
        Command::Top(flags) => block_on(top::run(flags, &router()?, output)),
        Command::Doctor(flags) => block_on(check::examine(flags, &target()?, output)),
        Command::Status(watch) => block_on(status::cluster(watch, &router()?, output)),
        Command::Check(flags) => block_on(check::run(flags, target, output)),
        Command::Transfer(TransferCommand::List(watch)) => {
            block_on(transfers::list(watch, &router()?, output))
        }
        Command::Transfer(TransferCommand::Test(flags)) => {
            block_on(transfers::test(flags, &router()?, output))
        }
        Command::Cache(command) => block_on(cache::run(command, &router()?, output)),
        Command::Tenant(command) => block_on(tenants::run(command, &router()?, output)),
        Command::Route(command) => block_on(route::run(command, &router()?, output)),
        Command::Request(command) => block_on(requests::run(command, &router()?, output)),
        Command::Sim(command) => sim::run(command, output),
        Command::Node(command) => block_on(node_admin::run(command, &router()?, output)),
        Command::Model(ModelCommand::Pull(flags)) => pull::pull(&flags, output),
        Command::Model(ModelCommand::List(watch)) => block_on(models::list(watch, &router()?, output)),
        Command::Model(ModelCommand::Load(flags)) => block_on(flip::load(&flags, &router()?, output)),
        Command::Model(ModelCommand::Unload(flags)) => block_on(flip::unload(&flags, &router()?, output)),
        Command::Key(command) => key::run(command, output),
        Command::Config(flags) => settings::run(&flags, output),
        Command::Context(command) => context::run(command, &cluster, output),
        Command::Debug(command) => block_on(debug::run(command, &target()?, output)),
        Command::Completions(flags) => manual::completions(&flags),
        Command::Man(flags) => manual::run(&flags),
    }
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(future)
}
