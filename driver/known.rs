// SPDX-License-Identifier: GPL-2.0

//! What was ever bound: kept as long as the module is loaded.
//!
//! An ID that changes between unbind and bind is a restore like any other. And a page that was
//! given to processes once can be mapped for as long, whatever became of its device.

use super::{
    generation_id::GenerationId,
    kernel::{
        memremap::{
            Range,
            ReservedPage, //
        },
        static_mutex::StaticMutex, //
    },
    sysgenid::Reseeds, //
};
use kernel::{
    prelude::*,
    sync::{
        static_lock_class,
        Arc, //
    }, //
};

/// No page holds a byte of an ID: the pages are for every process to see, the IDs for none.
struct Lists {
    ids: KVec<Arc<GenerationId>>,
    pages: KVec<ReservedPage>,
}

impl Lists {
    const fn new() -> Self {
        Self {
            ids: KVec::new(),
            pages: KVec::new(),
        }
    }
}

static LISTS: StaticMutex<Lists> =
    StaticMutex::new(c"vmgenid::known", || static_lock_class!(), Lists::new);

/// Forgets everything when it is dropped, that is when the module is unloaded.
pub(crate) struct Known(());

impl Known {
    /// To be called before anything is bound: the first use of the lists.
    pub(crate) fn new() -> Self {
        drop(LISTS.lock());
        Self(())
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        // A static is never dropped; what it owns is, here, and not under its lock.
        let lists = core::mem::replace(&mut *LISTS.lock(), Lists::new());
        drop(lists);
    }
}

/// Returns the ID that lies in `range`, with the last value seen there. `None`: it would lie in a
/// page that processes can map. `counted`: whether the reseeds with a new one are counted.
///
/// # Errors
///
/// Those of [`GenerationId::new`] and [`Reseeds::new`].
pub(crate) fn id(range: &Range, counted: bool) -> Result<Option<Arc<GenerationId>>> {
    let mut known = LISTS.lock();

    if known.pages.iter().any(|page| page.range().overlaps(range)) {
        return Ok(None);
    }
    if let Some(id) = known
        .ids
        .iter()
        .find(|id| id.range().start() == range.start())
    {
        return Ok(Some(id.clone()));
    }

    let reseeds = if counted { Some(Reseeds::new()?) } else { None };
    let id = GenerationId::new(*range, reseeds)?;
    known.ids.push(id.clone(), GFP_KERNEL)?;
    Ok(Some(id))
}

/// Notes that processes can map `page` from now on. `false`: it holds an ID, and must not be.
///
/// # Errors
///
/// `ENOMEM`: there is no memory to note it.
pub(crate) fn publish(page: &ReservedPage) -> Result<bool> {
    let mut known = LISTS.lock();

    if known.ids.iter().any(|id| id.range().overlaps(page.range())) {
        return Ok(false);
    }
    if !known
        .pages
        .iter()
        .any(|other| other.range().overlaps(page.range()))
    {
        known.pages.push(*page, GFP_KERNEL)?;
    }
    Ok(true)
}
