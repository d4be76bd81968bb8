// SPDX-License-Identifier: GPL-2.0

//! CPUs that come online.
//!
//! C header: [`include/linux/cpuhotplug.h`](srctree/include/linux/cpuhotplug.h)

use core::mem::transmute;
use kernel::{
    bindings,
    cpu::CpuId,
    error::to_result,
    ffi::{
        c_int,
        c_uint, //
    },
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Callbacks for CPUs.
pub(crate) trait Online: Send + Sync + 'static {
    /// Called for each CPU that is online, and then for each that comes online: in process context,
    /// one call at a time.
    ///
    /// No CPU comes or goes meanwhile. So it must not wait for anybody who may wait for that, as who
    /// holds `rtnl_lock` may.
    fn online(&self, cpu: CpuId);
}

/// A registered [`Online`]. It must not be dropped by its own callback.
///
/// # Invariants
///
/// `node` is an instance of `state`, whose callback is `online::<T>`.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: Online> {
    // It comes first: its address is that of the whole.
    #[pin]
    node: Opaque<bindings::hlist_node>,
    // Dropped after the instance was removed.
    state: State,
    handler: Arc<T>,
}

// SAFETY: An instance can be removed from any thread; the `Arc` can be sent.
unsafe impl<T: Online> Send for Registration<T> {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: Online> Sync for Registration<T> {}

impl<T: Online> Registration<T> {
    /// Calls `handler` for all CPUs that are online, and for those that come online until the result
    /// is dropped. In the kernel's list of such states it is called `name`.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory.
    /// - `ENOSPC`: too many have registered already; the kernel warns of that.
    pub(crate) fn new(name: &'static CStr, handler: Arc<T>) -> Result<Pin<KBox<Self>>> {
        let state = State::new(name, online::<T>)?;
        let number = state.0;

        KBox::try_pin_init(
            try_pin_init!(Self {
                // What the callback uses is there before it can be called.
                handler,
                state,
                node <- Opaque::try_ffi_init(|slot: *mut bindings::hlist_node| {
                    // SAFETY: The initializer can write to the provided `slot`.
                    unsafe { slot.write(pin_init::zeroed()) };
                    // INVARIANT: If this succeeds it is one.
                    // SAFETY: The state is one of instances, which are nodes like this one. It is
                    // pinned, and the destructor removes it.
                    to_result(unsafe { bindings::__cpuhp_state_add_instance(number, slot, true) })
                }),
            }? Error),
            GFP_KERNEL,
        )
    }
}

#[pinned_drop]
impl<T: Online> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // This waits for a running callback, so that `handler` is dropped after the last use.
        //
        // SAFETY: By the type invariants it is an instance of that state.
        unsafe { bindings::__cpuhp_state_remove_instance(self.state.0, self.node.get(), false) };
    }
}

/// A state that CPUs go through when they come online.
///
/// # Invariants
///
/// It was allocated dynamically, has instances, and belongs to this value.
struct State(bindings::cpuhp_state);

impl State {
    /// `online` is called with nodes that were added to this state.
    fn new(
        name: &'static CStr,
        online: unsafe extern "C" fn(c_uint, *mut bindings::hlist_node) -> c_int,
    ) -> Result<Self> {
        // SAFETY: As `cpuhp_setup_state_multi()` does it. A state that has instances keeps the
        // pointer in a union, and reads it as one of the type that it has here.
        let online = unsafe {
            transmute::<
                unsafe extern "C" fn(c_uint, *mut bindings::hlist_node) -> c_int,
                unsafe extern "C" fn(c_uint) -> c_int,
            >(online)
        };

        // SAFETY: The name is static. Nothing is called before there are instances.
        let state = unsafe {
            bindings::__cpuhp_setup_state(
                bindings::cpuhp_state_CPUHP_AP_ONLINE_DYN,
                name.as_char_ptr(),
                false,
                Some(online),
                None,
                true,
            )
        };
        to_result(state.min(0))?;
        // INVARIANT: It was just allocated, for this value.
        Ok(Self(state))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: By the type invariants it is ours. Who had instances of it has removed them.
        unsafe { bindings::__cpuhp_remove_state(self.0, false) };
    }
}

/// # Safety
///
/// To be used only as the callback of the state of a [`Registration`].
unsafe extern "C" fn online<T: Online>(cpu: c_uint, node: *mut bindings::hlist_node) -> c_int {
    // SAFETY: `Opaque` is transparent, so this is the first field of a `Registration<T>`, whose
    // handler is valid before the node is added, and until it has been removed. Only that field is
    // accessed.
    let handler = unsafe { &(*node.cast::<Registration<T>>()).handler };

    if let Some(cpu) = CpuId::from_u32(cpu) {
        handler.online(cpu);
    }
    // Any other number would keep the CPU offline.
    0
}
