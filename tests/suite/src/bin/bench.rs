// SPDX-License-Identifier: MIT OR Apache-2.0

//! The benchmark. See the library's module of that name.

fn main() -> std::process::ExitCode {
    suite::bench::main()
}
