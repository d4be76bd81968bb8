// SPDX-License-Identifier: GPL-2.0

//! The places of the generation IDs and of the counters' pages of all devices that were ever bound.
//!
//! A page stays mapped after its device was unbound. The lists live until the module is unloaded.

use super::{
    generation::Watched,
    prelude::*, //
};

/// No page contains a byte of an ID: every process can map the pages, and no process may read IDs.
struct Lists {
    ids: KVec<Range>,
    pages: KVec<Range>,
}

impl Lists {
    const EMPTY: Self = Self {
        ids: KVec::new(),
        pages: KVec::new(),
    };
}

kernel::sync::global_lock! {
    // SAFETY: `Registry::new` initializes it, before a device is bound.
    unsafe(uninit) static LISTS: Mutex<Lists> = Lists::EMPTY;
}

/// Owns the contents of the lists. The module has one, and drops it last.
pub(crate) struct Registry(());

impl Registry {
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The module calls this once, when it is loaded.
        unsafe { LISTS.init() };
        Ok(Self(()))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Rust does not drop a static, so this drops its contents.
        *LISTS.lock() = Lists::EMPTY;
    }
}

/// Returns the generation whose ID is in `range`, which counts reseeds if `counted`. Returns `None`
/// if the ID is in a page that processes can map.
///
/// # Errors
///
/// Those of [`Watched::map`], and `ENOMEM`.
pub(crate) fn generation(range: &Range, counted: bool) -> Result<Option<Arc<Watched>>> {
    let mut lists = LISTS.lock();

    if lists.pages.iter().any(|page| page.overlaps(range)) {
        return Ok(None);
    }
    push(&mut lists.ids, range)?;
    Watched::map(*range, counted).map(Some)
}

/// Adds `page` to the pages that processes can map. Returns `false` if it contains a byte of an ID:
/// then processes must not map it.
pub(crate) fn publish(page: &ReservedPage) -> Result<bool> {
    let mut lists = LISTS.lock();

    if lists.ids.iter().any(|id| id.overlaps(page.range())) {
        return Ok(false);
    }
    push(&mut lists.pages, page.range())?;
    Ok(true)
}

/// Adds `range`, unless it is there from an earlier bind.
fn push(list: &mut KVec<Range>, range: &Range) -> Result {
    if !list.iter().any(|known| known.start() == range.start()) {
        list.push(*range, GFP_KERNEL)?;
    }
    Ok(())
}
