// SPDX-License-Identifier: MIT OR Apache-2.0

//! The test suite. The library has its parts.

fn main() -> std::process::ExitCode {
    suite::main()
}
