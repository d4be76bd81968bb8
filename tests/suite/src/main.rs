// SPDX-License-Identifier: MIT OR Apache-2.0

//! The test suite. See the library for what is in it.

fn main() -> std::process::ExitCode {
    suite::main()
}
