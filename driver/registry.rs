// SPDX-License-Identifier: GPL-2.0

//! The generation IDs and the counters' pages of all devices that were ever bound.
//!
//! They live until the module is unloaded: an ID that has changed before the next bind is a change
//! like any other, and a page stays mapped after its device was unbound.

use super::{
    generation::Watched,
    kernel::static_mutex::static_mutex,
    prelude::*,
    shared::Shared, //
};

/// No page contains a byte of an ID: every process can map the pages, and no process may read IDs.
struct Lists {
    /// `None` while the module is being loaded or unloaded.
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

/// Owns the contents of the lists. The module has one, and drops it last.
pub(crate) struct Registry(());

impl Registry {
    /// Opens `/dev/random`, and starts the threads.
    pub(crate) fn new() -> Result<Self> {
        LISTS.lock().shared = Some(Shared::new()?);
        Ok(Self(()))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Rust does not drop a static, so this drops its contents. No device is bound and no file
        // is open: this waits for the last queued work.
        let lists = core::mem::replace(&mut *LISTS.lock(), Lists::EMPTY);
        drop(lists.generations);
        if let Some(shared) = lists.shared {
            shared.finish();
        }
    }
}

/// Returns the generation whose ID is in `range`: that of an earlier bind, or a new one, which
/// counts reseeds if `counted`. Returns `None` if the ID is in a page that processes can map.
///
/// # Errors
///
/// Those of [`Watched::map`], `ENOMEM`, and `ENODEV` if the module is being loaded or unloaded.
pub(crate) fn generation(range: &Range, counted: bool) -> Result<Option<Arc<Watched>>> {
    let mut lists = LISTS.lock();

    if lists.pages.iter().any(|page| page.range().overlaps(range)) {
        return Ok(None);
    }
    if let Some(known) = lists
        .generations
        .iter()
        .find(|known| known.id.range.start() == range.start())
    {
        return Ok(Some(known.clone()));
    }

    let shared = lists.shared.clone().ok_or(ENODEV)?;
    let generation = Watched::map(*range, shared, counted)?;
    lists.generations.push(generation.clone(), GFP_KERNEL)?;
    Ok(Some(generation))
}

/// Adds `page` to the pages that processes can map. Returns `false` if it contains a byte of an ID:
/// then processes must not map it.
pub(crate) fn publish(page: &ReservedPage) -> Result<bool> {
    let mut lists = LISTS.lock();

    if lists
        .generations
        .iter()
        .any(|known| known.id.range.overlaps(page.range()))
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
