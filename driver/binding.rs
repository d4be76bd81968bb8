// SPDX-License-Identifier: GPL-2.0

//! That a device is bound, as its open files see it.

use kernel::sync::Arc;

/// What open files use, which outlives an unbind.
pub(crate) trait Unbind {
    /// Has open files answer `ENODEV` from now on, and wakes who sleeps to be told.
    fn unbind(&self);
}

/// That the device of a `T` is bound. When this is dropped it no longer is.
pub(crate) struct Binding<T: Unbind>(Arc<T>);

impl<T: Unbind> Binding<T> {
    /// Says that the device is bound.
    pub(crate) fn new(of: Arc<T>) -> Self {
        Self(of)
    }
}

impl<T: Unbind> Drop for Binding<T> {
    fn drop(&mut self) {
        self.0.unbind();
    }
}
