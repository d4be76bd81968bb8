// SPDX-License-Identifier: GPL-2.0

//! A module through which tests observe and change a guest's kernel.
//!
//! In debugfs, below `vmforks/`:
//!
//! - `count`: how many times the vmfork notifiers were called. The notifier of this module takes
//!   `rtnl_lock`, as WireGuard's does.
//! - `hold_rtnl`: a write of a number of milliseconds holds `rtnl_lock` that long, or until a
//!   signal comes. A read returns whether a write holds it.
//! - `sleep`: for how many milliseconds that notifier sleeps, from now on, before it takes the lock.
//! - `spin`: for how many milliseconds it computes before that, which an interrupt's handler may.
//! - `work_on`: the number of a CPU, written here, queues work that does nothing for a worker of
//!   that CPU. The write does not wait for it. A read returns how often such work has been done.
//! - `notify`: a write of a number sends that many ACPI notifications, as QEMU's GPE does, but with
//!   no change of the ID. With a device tree, it raises the device's interrupt that many times. They
//!   have been handled when the write returns.
//! - `settle`: a read returns when all that had come before has been handled: ACPI's interrupts,
//!   the notifications, and the work items that call the notifiers.
//! - `handled`: how long after the last of these all handlers had returned, in nanoseconds.
//! - `took`: how long after the last of these the notifiers were last called, in nanoseconds.
//! - `at`: when the notifiers were last called, in nanoseconds of the monotonic clock.
//! - `interrupt`: a write of a number calls the handlers of ACPI's interrupt that many times, with
//!   no event for any of them. A read returns the shortest time of a call, in nanoseconds. (The
//!   time of the handlers' threads is not included.)
//! - `u32`: a read returns four results of `get_random_u32()`, in hexadecimal.
//! - `poke`: a write of "ADDRESS VALUE" writes a 32-bit word to a physical address that is not RAM.
//! - `churn`: a write of "ADDRESS MILLISECONDS" adds 1 to such a word again and again, for that long. A
//!   read returns how often.
//! - `watch`: a write of "ID COUNTER CHANGES", two physical addresses and a number, compares the
//!   counter until it has changed that often, and the ID at each change. A read returns how many
//!   changes there were (0 from its start on), and at how many of them the ID was still the old
//!   one. A change must not come before the start, nor before the last change has been counted.
//! - `canary`: a write of a number makes a mistake that one of the kernel's checkers must report. 1
//!   loses an allocation (kmemleak), 2 reads freed memory (KASAN), 3 takes two locks in both orders
//!   (lockdep). 4 reads a number in memory for two seconds and 5 writes it for as long, by functions
//!   in C: both at once are a data race (KCSAN, which watches C code only).
//!
//! With `fail_function`, the module also offers the functions that registrations call. Mainline
//! offers none of them.

use core::ptr::NonNull;
use kernel::{
    bindings,
    debugfs::{
        Dir,
        File, //
    },
    error::to_result,
    ffi::{
        c_int,
        c_uint,
        c_ulong,
        c_void, //
    },
    fmt,
    new_mutex,
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    types::Opaque,
    uaccess::UserSliceReader, //
};

/// How many times the vmfork notifiers were called.
static COUNT: Atomic<u32> = Atomic::new(0);

/// When the notifiers were last called, when a notification was last sent, and when the last ones
/// had been handled: nanoseconds of the monotonic clock.
static AT: Atomic<i64> = Atomic::new(0);
static SENT: Atomic<i64> = Atomic::new(0);
static HANDLED: Atomic<i64> = Atomic::new(0);

fn now() -> i64 {
    // SAFETY: The function takes no argument, and any context may call it.
    unsafe { bindings::ktime_get() }
}

/// How long the notifier sleeps, in milliseconds.
static SLEEP: Atomic<u32> = Atomic::new(0);

/// How long the notifier computes, in milliseconds.
static SPIN: Atomic<u32> = Atomic::new(0);

/// Whether a process holds `rtnl_lock` through `hold_rtnl`.
static HELD: Atomic<bool> = Atomic::new(false);

/// `rtnl_lock`, held.
struct Rtnl(());

impl Rtnl {
    fn lock() -> Self {
        // `include/linux/rtnetlink.h`, which the bindings leave out.
        extern "C" {
            fn rtnl_lock();
        }
        // SAFETY: All callers may sleep, and hold no lock that is taken inside this one.
        unsafe { rtnl_lock() };
        Self(())
    }
}

impl Drop for Rtnl {
    fn drop(&mut self) {
        extern "C" {
            fn rtnl_unlock();
        }
        // SAFETY: Taken in `lock()`.
        unsafe { rtnl_unlock() };
    }
}

/// A registered vmfork notifier, which counts.
///
/// # Invariants
///
/// `block` is registered.
#[pin_data(PinnedDrop)]
struct Notifier {
    #[pin]
    block: Opaque<bindings::notifier_block>,
}

// SAFETY: A notifier can be unregistered from any thread.
unsafe impl Send for Notifier {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl Sync for Notifier {}

impl Notifier {
    fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                let block = bindings::notifier_block {
                    notifier_call: Some(count),
                    ..pin_init::zeroed()
                };
                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(block) };
                // SAFETY: The block is valid, pinned, and unregistered before it goes.
                to_result(unsafe { bindings::register_random_vmfork_notifier(slot) })
            }),
        })
    }
}

#[pinned_drop]
impl PinnedDrop for Notifier {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants it is registered.
        unsafe { bindings::unregister_random_vmfork_notifier(self.block.get()) };
    }
}

/// # Safety
///
/// To be called where `rtnl_lock` may be taken, as a vmfork notifier is.
unsafe extern "C" fn count(
    _block: *mut bindings::notifier_block,
    _action: c_ulong,
    _data: *mut c_void,
) -> c_int {
    AT.store(now(), Relaxed);
    let end = now() + 1_000_000 * i64::from(SPIN.load(Relaxed));
    while now() < end {
        kernel::processor::cpu_relax();
    }
    let sleep = SLEEP.load(Relaxed);
    if sleep > 0 {
        // SAFETY: A vmfork notifier may sleep.
        unsafe { bindings::msleep(sleep) };
    }
    let _rtnl = Rtnl::lock();
    COUNT.fetch_add(1, Relaxed);
    bindings::NOTIFY_DONE as c_int
}

/// Reads the written numbers, with spaces between them.
fn numbers<const N: usize>(reader: &mut UserSliceReader) -> Result<[u64; N]> {
    let mut buf = [0u8; 48];
    let text = buf.get_mut(..reader.len()).ok_or(EINVAL)?;
    reader.read_slice(text)?;
    let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
    let mut numbers = [0; N];
    let mut words = text.split_whitespace();
    for number in &mut numbers {
        *number = words
            .next()
            .and_then(|word| word.parse().ok())
            .ok_or(EINVAL)?;
    }
    Ok(numbers)
}

fn number(reader: &mut UserSliceReader) -> Result<u32> {
    let [number] = numbers(reader)?;
    number.try_into().map_err(|_| EINVAL)
}

/// Words at a physical address that is not RAM.
///
/// # Invariants
///
/// `N` aligned words at `at` are mapped, readable and writable.
struct Words<const N: usize> {
    at: NonNull<u32>,
}

impl<const N: usize> Words<N> {
    fn at(address: u64) -> Result<Self> {
        // SAFETY: The kernel refuses an address that it cannot map.
        let at = unsafe { bindings::memremap(address, N * 4, bindings::MEMREMAP_WB as c_ulong) };
        let at = NonNull::new(at.cast::<u32>()).ok_or(ENOMEM)?;
        // INVARIANT: It is mapped; `memremap()` keeps the place in the page.
        at.is_aligned().then_some(Self { at }).ok_or(EINVAL)
    }

    fn load(&self) -> [u32; N] {
        // SAFETY: By the type invariants.
        core::array::from_fn(|n| unsafe { self.at.add(n).read_volatile() })
    }

    fn store(&self, n: usize, value: u32) {
        assert!(n < N);
        // SAFETY: By the type invariants.
        unsafe { self.at.add(n).write_volatile(value) };
    }
}

impl<const N: usize> Drop for Words<N> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants it is mapped, and there is no reference to it after this.
        unsafe { bindings::memunmap(self.at.as_ptr().cast()) };
    }
}

fn poke(reader: &mut UserSliceReader) -> Result {
    let [address, value] = numbers(reader)?;
    Words::<1>::at(address)?.store(0, value.try_into().map_err(|_| EINVAL)?);
    Ok(())
}

/// How often `churn` has changed the word.
static CHURNED: Atomic<u32> = Atomic::new(0);

fn churn(reader: &mut UserSliceReader) -> Result {
    let [address, milliseconds] = numbers(reader)?;
    let word = Words::<1>::at(address)?;
    let until = now() + milliseconds as i64 * 1_000_000;
    let [mut value] = word.load();
    CHURNED.store(0, Relaxed);
    while now() < until {
        for _ in 0..1000 {
            value = value.wrapping_add(1);
            word.store(0, value);
        }
        CHURNED.fetch_add(1000, Relaxed);
    }
    Ok(())
}

/// How many changes of the counter `watch` has seen (`u32::MAX` before it starts), and at how many
/// of them the ID was still the old one.
static SEEN: Atomic<u32> = Atomic::new(u32::MAX);
static TOO_EARLY: Atomic<u32> = Atomic::new(0);

fn watch(reader: &mut UserSliceReader) -> Result {
    let [id, counter, changes] = numbers(reader)?;
    let (id, counter) = (Words::<4>::at(id)?, Words::<1>::at(counter)?);
    let until = now() + 120_000_000_000;
    let (mut last_id, mut last) = (id.load(), counter.load());
    let mut seen = 0;
    TOO_EARLY.store(0, Relaxed);
    SEEN.store(seen, Relaxed);
    while u64::from(seen) < changes {
        if now() > until {
            return Err(ETIMEDOUT);
        }
        // The loop sleeps so seldom that most of its time is spent comparing.
        if (0..1_000_000).any(|_| counter.load() != last) {
            if id.load() == last_id {
                TOO_EARLY.fetch_add(1, Relaxed);
            }
            // After the sleep, the ID and the counter are complete. The host makes no change until
            // this one is counted.
            // SAFETY: We may sleep.
            unsafe { bindings::msleep(1) };
            (last_id, last) = (id.load(), counter.load());
            seen += 1;
            SEEN.store(seen, Relaxed);
        }
        // SAFETY: As above.
        unsafe { bindings::msleep(0) };
    }
    Ok(())
}

fn hold_rtnl(reader: &mut UserSliceReader) -> Result {
    let _rtnl = Rtnl::lock();
    // The number is copied under the lock, as the network's own ioctls do it, so that lockdep also
    // learns that order.
    let milliseconds = number(reader)?;
    HELD.store(true, Relaxed);
    // SAFETY: We may sleep.
    unsafe { bindings::msleep_interruptible(milliseconds as c_uint) };
    HELD.store(false, Relaxed);
    Ok(())
}

/// Whether the firmware's description is ACPI's, and not a device tree.
fn has_acpi() -> bool {
    // SAFETY: The kernel sets it at boot.
    unsafe { bindings::acpi_disabled == 0 }
}

/// Raises the interrupt that the device has in the device tree, in the interrupt controller, and waits
/// until its handler has been called.
#[cfg(CONFIG_OF)]
fn raise() -> Result {
    // `include/linux/of_irq.h`, which the bindings leave out.
    extern "C" {
        fn irq_of_parse_and_map(node: *mut bindings::device_node, index: c_int) -> c_uint;
    }
    const PENDING: bindings::irqchip_irq_state = bindings::irqchip_irq_state_IRQCHIP_STATE_PENDING;
    let (none, until) = (core::ptr::null_mut(), now() + 10_000_000_000);
    // SAFETY: The name is a C string, and null pointers mean "any". The node is not freed: the
    // kernel's tree does not change.
    let node = unsafe {
        let name = c"microsoft,vmgenid".as_char_ptr();
        bindings::of_find_compatible_node(none, none.cast(), name.cast())
    };
    let node = NonNull::new(node).ok_or(ENODEV)?;
    // SAFETY: The node is valid. The device has been registered, so there is a mapping.
    let irq = unsafe { irq_of_parse_and_map(node.as_ptr(), 0) };
    // SAFETY: To be called from where one may sleep.
    to_result(unsafe { bindings::irq_set_irqchip_state(irq, PENDING, true) })?;
    let mut pending = true;
    while pending {
        // SAFETY: As above; the state can be written to.
        to_result(unsafe { bindings::irq_get_irqchip_state(irq, PENDING, &mut pending) })?;
        if now() > until {
            return Err(ETIMEDOUT);
        }
    }
    // SAFETY: We may sleep.
    unsafe { bindings::synchronize_irq(irq) };
    Ok(())
}

#[cfg(not(CONFIG_OF))]
fn raise() -> Result {
    Err(ENODEV)
}

/// Waits until all notifications that have come have been handled.
fn await_notifications() {
    // SAFETY: We may sleep, and hold no lock. A notify handler of the driver returns when its thread
    // has applied the rule. With a device tree, the interrupt's handler wakes that thread, which has
    // a real-time priority.
    unsafe {
        if has_acpi() {
            bindings::acpi_os_wait_events_complete();
        } else {
            bindings::msleep(20);
        }
    }
}

fn notify(reader: &mut UserSliceReader) -> Result {
    for _ in 0..number(reader)? {
        SENT.store(now(), Relaxed);
        if !has_acpi() {
            raise()?;
            continue;
        }
        // SAFETY: The name is a C string that the function does not write to; the two null
        // pointers mean "no arguments" and "no result".
        let status = unsafe {
            bindings::acpi_evaluate_object(
                core::ptr::null_mut(),
                c"\\_GPE._E05".as_char_ptr().cast_mut(),
                core::ptr::null_mut(),
                core::ptr::null_mut(),
            )
        };
        if status != 0 {
            return Err(EIO);
        }
    }
    await_notifications();
    HANDLED.store(now(), Relaxed);
    Ok(())
}

/// How often the work of `work_on` was done.
static WORKED: Atomic<u32> = Atomic::new(0);

/// Work that does nothing, of which one at a time is queued.
#[pin_data(PinnedDrop)]
struct Work {
    #[pin]
    work: Opaque<bindings::work_struct>,
}

// SAFETY: The kernel's functions for a work item may be called from any thread.
unsafe impl Send for Work {}
// SAFETY: As above.
unsafe impl Sync for Work {}

impl Work {
    fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            work <- Opaque::ffi_init(|slot| {
                // SAFETY: The initializer can write to `slot`, which stays where it is; the name is
                // a C string, and the key is static.
                unsafe {
                    bindings::init_work_with_key(
                        slot,
                        Some(worked),
                        false,
                        c"vmforks".as_char_ptr(),
                        kernel::static_lock_class!().as_ptr(),
                    )
                };
            }),
        })
    }

    fn queue_on(&self, reader: &mut UserSliceReader) -> Result {
        let cpu = number(reader)?;
        // SAFETY: The work is initialized, and is cancelled before it goes.
        unsafe {
            bindings::queue_work_on(cpu as c_int, bindings::system_percpu_wq, self.work.get())
        };
        Ok(())
    }
}

#[pinned_drop]
impl PinnedDrop for Work {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: The work is initialized, and we may sleep.
        unsafe { bindings::cancel_work_sync(self.work.get()) };
    }
}

/// # Safety
///
/// To be called by a worker.
unsafe extern "C" fn worked(_work: *mut bindings::work_struct) {
    WORKED.fetch_add(1, Relaxed);
}

/// How long the handlers of ACPI's interrupt took at least.
static INTERRUPT: Atomic<i64> = Atomic::new(0);

/// The number of ACPI's interrupt, for callers that must not sleep.
static IRQ: Atomic<u32> = Atomic::new(0);

/// ACPI's interrupt.
fn acpi_interrupt() -> Result<u32> {
    let mut irq = 0;
    // SAFETY: The FADT does not change, and the number can be written to.
    to_result(unsafe {
        bindings::acpi_gsi_to_irq(bindings::acpi_gbl_FADT.sci_interrupt.into(), &mut irq)
    })?;
    Ok(irq)
}

fn interrupt(reader: &mut UserSliceReader) -> Result {
    let irq = acpi_interrupt()?;
    IRQ.store(irq, Relaxed);
    let work = bindings::irq_work {
        func: Some(call_handlers),
        ..pin_init::zeroed()
    };
    let work = KBox::pin(Opaque::new(work), GFP_KERNEL)?;
    INTERRUPT.store(i64::MAX, Relaxed);
    for _ in 0..number(reader)? {
        // SAFETY: The work is initialized, pinned, and done with when `irq_work_sync()` returns. The
        // threads of the handlers have ended after `synchronize_irq()`. We may sleep.
        unsafe {
            bindings::irq_work_queue(work.get());
            bindings::irq_work_sync(work.get());
            bindings::synchronize_irq(irq);
        }
    }
    Ok(())
}

/// # Safety
///
/// To be called in interrupt context.
unsafe extern "C" fn call_handlers(_work: *mut bindings::irq_work) {
    let start = now();
    // SAFETY: To be called from anywhere, and in interrupt context for such an interrupt.
    unsafe { bindings::generic_handle_irq_safe(IRQ.load(Relaxed)) };
    let took = now() - start;
    if took < INTERRUPT.load(Relaxed) {
        INTERRUPT.store(took, Relaxed);
    }
}

fn settle() {
    await_notifications();
    // SAFETY: We may sleep, and are in no work item. The rule, where it has been applied, has queued
    // the work item.
    unsafe { bindings::__flush_workqueue(bindings::system_dfl_wq) };
}

/// The number that canaries 4 and 5 race for, as a C string.
static RACED: Atomic<u64> = Atomic::new(u64::from_le_bytes(*b"1234567\0"));

fn canary(reader: &mut UserSliceReader) -> Result {
    let until = now() + 2_000_000_000;
    match number(reader)? {
        1 => {
            for _ in 0..10 {
                core::mem::forget(KBox::new([0u64; 16], GFP_KERNEL)?);
            }
        }
        2 => {
            let freed = KBox::into_raw(KBox::new([0u64; 16], GFP_KERNEL)?);
            // SAFETY: The allocation is valid. The load after that is the mistake.
            let _ = unsafe {
                bindings::kfree(freed.cast());
                (*freed)[1..].as_ptr().read_volatile()
            };
        }
        3 => {
            let one = KBox::pin_init(new_mutex!(()), GFP_KERNEL)?;
            let other = KBox::pin_init(new_mutex!(()), GFP_KERNEL)?;
            for (first, second) in [(&one, &other), (&other, &one)] {
                let _first = first.lock();
                let _second = second.lock();
            }
        }
        4 => {
            while now() < until {
                let mut value = 0;
                // SAFETY: The string ends with a zero. That another thread writes it is the mistake.
                let _ = unsafe { bindings::kstrtouint(RACED.as_ptr().cast(), 10, &mut value) };
            }
        }
        5 => {
            while now() < until {
                for number in [1_234_567u32, 7_654_321] {
                    // SAFETY: 7 digits and a zero are 8 bytes. The race is the mistake.
                    unsafe {
                        bindings::snprintf(
                            RACED.as_ptr().cast(),
                            size_of::<u64>(),
                            c"%u".as_char_ptr(),
                            number,
                        )
                    };
                }
            }
        }
        _ => return Err(EINVAL),
    }
    Ok(())
}

/// The functions that may be made to fail: `ALLOW_ERROR_INJECTION()`.
#[cfg(CONFIG_FUNCTION_ERROR_INJECTION)]
mod injectable {
    use super::*;

    /// `struct error_injection_entry`, with an address that can be had at compile time.
    #[repr(C)]
    struct Entry {
        addr: *const (),
        etype: c_int,
    }

    // SAFETY: No code follows the pointer, and no code writes to it.
    unsafe impl Sync for Entry {}

    macro_rules! entries {
        ($($name:ident: $etype:ident,)*) => {
            [$(Entry {
                addr: bindings::$name as *const (),
                etype: bindings::$etype as c_int,
            }),*]
        };
    }

    #[used]
    #[link_section = "_error_injection_whitelist"]
    static ENTRIES: [Entry; 12] = entries! {
        __devm_add_action: EI_ETYPE_ERRNO,
        __platform_driver_register: EI_ETYPE_ERRNO,
        // Its status 1 is `AE_ERROR`.
        acpi_evaluate_object: EI_ETYPE_TRUE,
        acpi_get_handle: EI_ETYPE_TRUE,
        acpi_gsi_to_irq: EI_ETYPE_ERRNO,
        devm_acpi_install_notify_handler: EI_ETYPE_ERRNO,
        kthread_create_worker_on_node: EI_ETYPE_ERRNO,
        memremap: EI_ETYPE_NULL,
        misc_register: EI_ETYPE_ERRNO,
        register_pm_notifier: EI_ETYPE_ERRNO,
        request_threaded_irq: EI_ETYPE_ERRNO,
        vm_iomap_memory: EI_ETYPE_ERRNO,
    };
}

#[pin_data]
struct VmForks {
    #[pin]
    _count: File<()>,
    #[pin]
    _hold_rtnl: File<()>,
    #[pin]
    _sleep: File<()>,
    #[pin]
    _spin: File<()>,
    #[pin]
    _work_on: File<Work>,
    #[pin]
    _notify: File<()>,
    #[pin]
    _u32: File<()>,
    #[pin]
    _poke: File<()>,
    #[pin]
    _churn: File<()>,
    #[pin]
    _watch: File<()>,
    #[pin]
    _canary: File<()>,
    #[pin]
    _interrupt: File<()>,
    #[pin]
    _settle: File<()>,
    #[pin]
    _handled: File<()>,
    #[pin]
    _took: File<()>,
    #[pin]
    _at: File<()>,
    #[pin]
    _notifier: Notifier,
    _dir: Dir,
}

impl kernel::InPlaceModule for VmForks {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let dir = Dir::new(c"vmforks");
        try_pin_init!(Self {
            _count <- dir.read_callback_file(
                c"count",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| writeln!(f, "{}", COUNT.load(Relaxed)),
            ),
            _hold_rtnl <- dir.read_write_callback_file(
                c"hold_rtnl",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| writeln!(f, "{}", HELD.load(Relaxed)),
                &|(): &(), reader: &mut UserSliceReader| hold_rtnl(reader),
            ),
            _sleep <- dir.write_callback_file(
                c"sleep",
                (),
                &|(): &(), reader: &mut UserSliceReader| {
                    SLEEP.store(number(reader)?, Relaxed);
                    Ok(())
                },
            ),
            _spin <- dir.write_callback_file(
                c"spin",
                (),
                &|(): &(), reader: &mut UserSliceReader| {
                    SPIN.store(number(reader)?, Relaxed);
                    Ok(())
                },
            ),
            _work_on <- dir.read_write_callback_file(
                c"work_on",
                Work::new(),
                &|_: &Work, f: &mut fmt::Formatter<'_>| {
                    writeln!(f, "{}", WORKED.load(Relaxed))
                },
                &|work: &Work, reader: &mut UserSliceReader| work.queue_on(reader),
            ),
            _notify <- dir.write_callback_file(
                c"notify",
                (),
                &|(): &(), reader: &mut UserSliceReader| notify(reader),
            ),
            _u32 <- dir.read_callback_file(
                c"u32",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| {
                    for _ in 0..4 {
                        // SAFETY: The function takes no argument, and any context may call it.
                        write!(f, "{:08x}", unsafe { bindings::get_random_u32() })?;
                    }
                    writeln!(f)
                },
            ),
            _poke <- dir.write_callback_file(
                c"poke",
                (),
                &|(): &(), reader: &mut UserSliceReader| poke(reader),
            ),
            _churn <- dir.read_write_callback_file(
                c"churn",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| writeln!(f, "{}", CHURNED.load(Relaxed)),
                &|(): &(), reader: &mut UserSliceReader| churn(reader),
            ),
            _watch <- dir.read_write_callback_file(
                c"watch",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| {
                    writeln!(f, "{} {}", SEEN.load(Relaxed), TOO_EARLY.load(Relaxed))
                },
                &|(): &(), reader: &mut UserSliceReader| watch(reader),
            ),
            _canary <- dir.write_callback_file(
                c"canary",
                (),
                &|(): &(), reader: &mut UserSliceReader| canary(reader),
            ),
            _interrupt <- dir.read_write_callback_file(
                c"interrupt",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| writeln!(f, "{}", INTERRUPT.load(Relaxed)),
                &|(): &(), reader: &mut UserSliceReader| interrupt(reader),
            ),
            _settle <- dir.read_callback_file(
                c"settle",
                (),
                &|(): &(), _: &mut fmt::Formatter<'_>| {
                    settle();
                    Ok(())
                },
            ),
            _handled <- dir.read_callback_file(
                c"handled",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| {
                    writeln!(f, "{}", HANDLED.load(Relaxed) - SENT.load(Relaxed))
                },
            ),
            _took <- dir.read_callback_file(
                c"took",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| {
                    writeln!(f, "{}", AT.load(Relaxed) - SENT.load(Relaxed))
                },
            ),
            _at <- dir.read_callback_file(
                c"at",
                (),
                &|(): &(), f: &mut fmt::Formatter<'_>| writeln!(f, "{}", AT.load(Relaxed)),
            ),
            _notifier <- Notifier::new(),
            _dir: dir,
        })
    }
}

module! {
    type: VmForks,
    name: "vmforks",
    authors: ["The vmgenid authors"],
    description: "What the tests of vmgenid see and do inside of the kernel",
    license: "GPL v2",
}
