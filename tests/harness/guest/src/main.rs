// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's first process, and the agent that runs commands for the host.

mod agent;
mod init;
mod job;

use clap::Parser;

#[derive(Parser)]
#[command(about = "What runs in the guest", disable_help_subcommand = true)]
enum Program {
    Init(init::Args),
    Agent(agent::Args),
}

fn main() -> anyhow::Result<()> {
    match Program::parse() {
        Program::Init(args) => init::run(args),
        Program::Agent(args) => agent::run(args),
    }
}
