// SPDX-License-Identifier: GPL-2.0

//! The generation IDs and the counters' pages that were ever bound, until the module is unloaded.
//!
//! An ID that changes between an unbind and the next bind is a restore like any other. A page that a
//! process has mapped stays mapped, whatever became of its device.

use super::{
    generation::{
        Shared,
        Watched, //
    },
    kernel::{
        memremap::{
            Range,
            ReservedPage, //
        },
        static_mutex::static_mutex, //
    }, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// No page holds a byte of an ID: all processes can see the pages, and none may see an ID.
struct Lists {
    /// `None`: The module is being loaded or unloaded.
    shared: Option<Arc<Shared>>,
    generations: KVec<Arc<Watched>>,
    pages: KVec<ReservedPage>,
}

impl Lists {
    const EMPTY: Self = Self {
        shared: None,
        generations: KVec::new(),
        pages: KVec::new(),
    };
}

static_mutex! {
    static LISTS: Mutex<Lists> = Lists::EMPTY;
}

/// The lists, as long as the module is loaded. The module has one, which it drops last.
pub(crate) struct Registry(());

impl Registry {
    /// Opens `/dev/random`, and starts the threads.
    ///
    /// # Errors
    ///
    /// Those of [`Shared::new`].
    pub(crate) fn new() -> Result<Self> {
        LISTS.lock().shared = Some(Shared::new()?);
        Ok(Self(()))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // A static is not dropped with its module, so what it owns is dropped here.
        // No device is bound and no file is open: this waits for the work that is left.
        let lists = core::mem::replace(&mut *LISTS.lock(), Lists::EMPTY);
        drop(lists);
    }
}

/// Returns the generation whose ID lies in `range`, as it was bound last or as a new one. `None`:
/// The ID would lie in a page that processes can map. `counted`: whether a new one counts reseeds.
///
/// # Errors
///
/// Those of [`Watched::map`].
pub(crate) fn generation(range: &Range, counted: bool) -> Result<Option<Arc<Watched>>> {
    let mut lists = LISTS.lock();

    if lists.pages.iter().any(|page| page.range().overlaps(range)) {
        return Ok(None);
    }
    if let Some(known) = lists
        .generations
        .iter()
        .find(|known| known.range().start() == range.start())
    {
        return Ok(Some(known.clone()));
    }

    let shared = lists.shared.clone().ok_or(ENODEV)?;
    let generation = Watched::map(*range, shared, counted)?;
    lists.generations.push(generation.clone(), GFP_KERNEL)?;
    Ok(Some(generation))
}

/// Notes that processes can map `page` from now on. `false`: The page holds an ID, and must not be
/// mapped.
///
/// # Errors
///
/// `ENOMEM`: There is no memory to note it.
pub(crate) fn publish(page: &ReservedPage) -> Result<bool> {
    let mut lists = LISTS.lock();

    if lists
        .generations
        .iter()
        .any(|known| known.range().overlaps(page.range()))
    {
        return Ok(false);
    }
    if !lists
        .pages
        .iter()
        .any(|known| known.range().overlaps(page.range()))
    {
        lists.pages.push(*page, GFP_KERNEL)?;
    }
    Ok(true)
}
