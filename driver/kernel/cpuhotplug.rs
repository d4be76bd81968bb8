// SPDX-License-Identifier: GPL-2.0

//! CPUs that come online.
//!
//! C header: [`include/linux/cpuhotplug.h`](srctree/include/linux/cpuhotplug.h)

use super::static_mutex::StaticMutex;
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
    static_lock_class,
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
/// `node` is an instance of `state`.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Registration {
    // It comes first: its address is that of the whole.
    #[pin]
    node: Opaque<bindings::hlist_node>,
    // Dropped after the instance was removed.
    state: State,
    handler: Arc<dyn Online>,
}

// SAFETY: An instance can be removed from any thread; the `Arc` can be sent.
unsafe impl Send for Registration {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl Sync for Registration {}

impl Registration {
    /// Calls `handler` for all CPUs that are online, and for those that come online until the result
    /// is dropped.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory.
    /// - `ENOSPC`: other drivers have all of the states; the kernel warns of that.
    pub(crate) fn new(handler: Arc<dyn Online>) -> Result<Pin<KBox<Self>>> {
        let state = State::get()?;
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
impl PinnedDrop for Registration {
    fn drop(self: Pin<&mut Self>) {
        // This waits for a running callback, so that `handler` is dropped after the last use.
        //
        // SAFETY: By the type invariants it is an instance of that state.
        unsafe { bindings::__cpuhp_state_remove_instance(self.state.0, self.node.get(), false) };
    }
}

/// The state that CPUs go through when they come online, as long as it has users. There are few
/// states for all drivers, so the registrations share one.
struct Shared {
    state: bindings::cpuhp_state,
    users: usize,
}

impl Shared {
    const fn new() -> Self {
        Self { state: 0, users: 0 }
    }
}

static SHARED: StaticMutex<Shared> =
    StaticMutex::new(c"vmgenid::cpuhotplug", || static_lock_class!(), Shared::new);

/// One use of the shared state.
///
/// # Invariants
///
/// It is counted in [`SHARED`], and the number is that of the state there.
struct State(bindings::cpuhp_state);

impl State {
    fn get() -> Result<Self> {
        let mut shared = SHARED.lock();
        if shared.users == 0 {
            shared.state = allocate()?;
        }
        // INVARIANT: Here it is counted.
        shared.users += 1;
        Ok(Self(shared.state))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let mut shared = SHARED.lock();
        shared.users -= 1;
        if shared.users == 0 {
            // SAFETY: It was allocated by the first user. Who had instances of it has removed them.
            unsafe { bindings::__cpuhp_remove_state(self.0, false) };
        }
    }
}

/// Allocates a state whose instances are the nodes of [`Registration`]s.
fn allocate() -> Result<bindings::cpuhp_state> {
    // SAFETY: As `cpuhp_setup_state_multi()` does it. A state that has instances keeps the pointer
    // in a union, and reads it as one of the type that it has here.
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
            crate::NAME.as_char_ptr(),
            false,
            Some(online),
            None,
            true,
        )
    };
    to_result(state.min(0))?;
    Ok(state)
}

/// # Safety
///
/// To be used only as the callback of the state of [`Registration`]s.
unsafe extern "C" fn online(cpu: c_uint, node: *mut bindings::hlist_node) -> c_int {
    // SAFETY: `Opaque` is transparent, so this is the first field of a `Registration`, whose handler
    // is valid before the node is added, and until it has been removed. Only that field is accessed.
    let handler = unsafe { &(*node.cast::<Registration>()).handler };

    if let Some(cpu) = CpuId::from_u32(cpu) {
        handler.online(cpu);
    }
    // Any other number would keep the CPU offline.
    0
}
