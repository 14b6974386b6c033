//! The one binary: all roles, `up`, and the cluster admin commands.
//!
//! Data go to stdout, everything else to stderr. The exit code says what kind of failure it was
//! (`types::ErrorCode::exit`, after `sysexits.h`), or 10 where `perigee check` or `perigee doctor` found something wrong.

mod arguments;
mod bench;
mod cache;
mod chat;
mod check;
mod demo;
mod generate;
mod key;
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
mod top;
mod transfers;
mod up;

use std::process::ExitCode;

use clap::Parser;
use types::ErrorCode;

use arguments::{Arguments, Command, ModelCommand, TransferCommand};
use reach::Router;

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
        Err(error) => {
            eprintln!("perigee: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
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
        router: address,
        api_key,
        command,
    } = arguments;
    let key = api_key.as_ref();
    let router = || Router::new(&address, key);
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
        Command::Status => block_on(status::cluster(&router()?, output)),
        Command::Top(flags) => block_on(top::run(flags, &router()?, output)),
        Command::Check(flags) => block_on(check::run(flags, &address, key, output)),
        Command::Doctor(flags) => block_on(check::examine(flags, &address, key, output)),
        Command::Transfer(TransferCommand::List) => block_on(transfers::list(&router()?, output)),
        Command::Transfer(TransferCommand::Test(flags)) => {
            block_on(transfers::test(flags, &router()?, output))
        }
        Command::Cache(command) => block_on(cache::run(command, &router()?, output)),
        Command::Route(command) => block_on(route::run(command, &router()?, output)),
        Command::Request(command) => block_on(requests::run(command, &router()?, output)),
        Command::Sim(command) => sim::run(command, output),
        Command::Node(command) => block_on(node_admin::run(command, &router()?, output)),
        Command::Model(ModelCommand::Pull(flags)) => pull::pull(&flags, output),
        Command::Model(ModelCommand::List) => pull::list(output),
        Command::Key(command) => key::run(command, output),
        Command::Config(flags) => settings::show(&flags, output),
    }
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(future)
}
