// SPDX-License-Identifier: MIT OR Apache-2.0

//! Prints the generation after each restore, in a program that uses tokio.

use std::{error::Error, io, sync::Arc};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime,
    task::spawn_blocking,
};
use vmgenid::Counter;

/// Calls the barrier on another thread: it may sleep until the kernel has been reseeded.
async fn barrier(counter: &Arc<Counter>) -> Result<u64, Box<dyn Error>> {
    let counter = counter.clone();
    let generation = spawn_blocking(move || counter.barrier()).await??;
    Ok(generation.number())
}

#[expect(unsafe_code, reason = "tokio cannot know how long a file stays open")]
fn watch(counter: Arc<Counter>) -> io::Result<AsyncFd<Arc<Counter>>> {
    // SAFETY: A counter has the same file, which is open, until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(counter, Interest::READABLE) }?)
}

async fn report() -> Result<(), Box<dyn Error>> {
    // The barrier ends the readiness, so a `Guard` needs a counter of its own.
    let counter = watch(Arc::new(Counter::open()?))?;
    let mut generation = barrier(counter.get_ref()).await?;
    println!("generation {generation}");
    loop {
        // This comes before the barrier: a restore after the barrier makes the file readable again.
        counter.readable().await?.clear_ready();
        let new = barrier(counter.get_ref()).await?;
        if new != generation {
            println!("restored: generation {new}");
            generation = new;
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(report())
}
