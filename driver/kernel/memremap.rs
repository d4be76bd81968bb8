// SPDX-License-Identifier: GPL-2.0

//! Memory that the firmware has reserved, and that the hypervisor writes to.
//!
//! C headers: [`include/linux/io.h`](srctree/include/linux/io.h),
//! [`include/linux/ioport.h`](srctree/include/linux/ioport.h)

use core::{
    ops::{
        self,
        Deref, //
    },
    ptr::NonNull, //
};
use kernel::{
    bindings,
    ffi::{
        c_int,
        c_void, //
    },
    page::PAGE_SIZE,
    prelude::*,
    sync::atomic::{
        Atomic,
        AtomicType, //
    }, //
};

/// A range of physical addresses outside of System RAM.
///
/// # Invariants
///
/// `start..start + len` is not empty, and lies within the physical address space. No byte of it was
/// System RAM when it was checked. (Hotplugged memory is outside of the firmware's map.)
#[derive(Clone, Copy)]
pub(crate) struct Range {
    start: u64,
    len: usize,
}

impl Range {
    /// Checks a range of `len` bytes at the physical address `start`.
    ///
    /// # Errors
    ///
    /// A phrase that completes "ADDR ..." in the log.
    pub(crate) fn new(start: u64, len: usize) -> Result<Self, &'static str> {
        // SAFETY: The kernel sets `end` at boot, from the processor's physical address width.
        let last = unsafe { bindings::iomem_resource.end };
        match start.checked_add(len as u64) {
            Some(end) if len > 0 && end - 1 <= last => (),
            _ => return Err("is beyond the physical address width"),
        }

        // SAFETY: The function only looks addresses up.
        let system_ram = unsafe {
            bindings::region_intersects(
                start,
                len,
                c_ulong_of(bindings::IORESOURCE_SYSTEM_RAM),
                c_ulong_of(bindings::IORES_DESC_NONE),
            )
        };
        if system_ram != bindings::REGION_DISJOINT as c_int {
            return Err("is in System RAM");
        }

        // INVARIANT: Checked above.
        Ok(Self { start, len })
    }

    /// Returns the physical address of the first byte.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Returns whether the two ranges have a byte in common.
    pub(crate) fn overlaps(&self, other: &Range) -> bool {
        // By the type invariants, neither sum overflows.
        self.start < other.start + other.len as u64 && other.start < self.start + self.len as u64
    }

    /// Calls `found` with the length and the descriptor of each part of the range that the kernel's
    /// map of physical addresses lists with all of `flags`, and, unless it is `IORES_DESC_NONE`,
    /// with the descriptor `desc`. The map's entries inside of such a part are not visited.
    fn walk(&self, flags: u32, desc: u32, mut found: &mut dyn FnMut(u64, u32)) {
        /// # Safety
        ///
        /// `res` is valid, and `found` points exclusively at the `found` of `walk`.
        unsafe extern "C" fn part(res: *mut bindings::resource, found: *mut c_void) -> c_int {
            // SAFETY: By the safety requirements of this function.
            let (res, found) = unsafe { (&*res, &mut *found.cast::<&mut dyn FnMut(u64, u32)>()) };
            found(res.end - res.start + 1, res.desc as u32);
            0
        }

        // SAFETY: `part` gets a valid resource, clipped to the range, and the pointer to `found`.
        unsafe {
            bindings::walk_iomem_res_desc(
                c_ulong_of(desc),
                c_ulong_of(flags),
                self.start,
                self.start + self.len as u64 - 1,
                (&raw mut found).cast(),
                Some(part),
            )
        };
    }

    /// Returns whether the firmware's memory map lists every byte of the range as reserved or as
    /// ACPI non-volatile storage.
    fn is_reserved(&self) -> bool {
        let mut sum = 0;
        for desc in RESERVED {
            // Entries of the firmware's map do not overlap, so no byte is counted twice.
            self.walk(bindings::IORESOURCE_MEM, desc, &mut |len, _| sum += len);
        }
        sum == self.len as u64
    }

    /// Returns whether the kernel knows of a device or of ROM in the range. The firmware lists such
    /// ranges also as reserved.
    fn has_device(&self) -> bool {
        // From here to 4 GiB a PC has its APICs, the HPET, the chipset's registers, the TPM and the
        // firmware's flash memory. The kernel does not know of all of them.
        #[cfg(CONFIG_X86)]
        if self.start < CHIPSET.end && CHIPSET.start < self.start + self.len as u64 {
            return true;
        }

        let mut has_device = false;
        for flag in [
            // Claimed by a driver or, as ECAM is, by the kernel itself. Some of the firmware's
            // entries are claimed, too; this does not visit the entries inside of those.
            bindings::IORESOURCE_BUSY,
            // PCI BARs, claimed or not, the windows that contain them, and ROM. The kernel enlarges
            // a reserved entry to contain the entries that it overlaps: these can be inside of one.
            bindings::IORESOURCE_SIZEALIGN,
            bindings::IORESOURCE_WINDOW,
            bindings::IORESOURCE_READONLY,
        ] {
            let flags = bindings::IORESOURCE_MEM | flag;
            self.walk(flags, bindings::IORES_DESC_NONE, &mut |_, desc| {
                has_device |= flag != bindings::IORESOURCE_BUSY || !RESERVED.contains(&desc)
            });
        }
        has_device
    }
}

/// The addresses of a PC's chipset.
#[cfg(CONFIG_X86)]
const CHIPSET: ops::Range<u64> = 0xfec0_0000..0x1_0000_0000;

/// The descriptors of memory that the firmware has reserved.
const RESERVED: [u32; 2] = [
    bindings::IORES_DESC_RESERVED,
    bindings::IORES_DESC_ACPI_NV_STORAGE,
];

/// A page that the firmware has reserved.
///
/// # Invariants
///
/// The range is one whole, aligned page. When it was checked, the firmware's map listed every byte
/// as reserved or as ACPI non-volatile storage, and the kernel knew of no device in it.
#[derive(Clone, Copy)]
pub(crate) struct ReservedPage(Range);

impl ReservedPage {
    /// Checks the page at the physical address `start`.
    ///
    /// # Errors
    ///
    /// A phrase that completes "ADDR ..." in the log.
    pub(crate) fn new(start: u64) -> Result<Self, &'static str> {
        if start % PAGE_SIZE as u64 != 0 {
            return Err("is not page aligned");
        }
        let range = Range::new(start, PAGE_SIZE)?;

        if !range.is_reserved() {
            return Err("is not in memory that the firmware reserved");
        }
        if range.has_device() {
            return Err("is in a device's memory or in ROM");
        }

        // INVARIANT: Checked above.
        Ok(Self(range))
    }

    /// Returns the page as a range of addresses.
    pub(crate) fn range(&self) -> &Range {
        &self.0
    }
}

// bindgen chooses the type of these constants. The parameters have C's type.
const fn c_ulong_of(value: u32) -> kernel::ffi::c_ulong {
    value as kernel::ffi::c_ulong
}

/// Types for memory that the hypervisor writes to at any time.
///
/// # Safety
///
/// Every bit pattern is valid, and every access through a shared reference is atomic.
pub(crate) unsafe trait Shared {}

// SAFETY: By `FromBytes` every bit pattern is valid, and `Atomic` has atomic accesses only.
unsafe impl<T: AtomicType + FromBytes> Shared for Atomic<T> {}

// SAFETY: An array has nothing but its elements.
unsafe impl<T: Shared, const N: usize> Shared for [T; N] {}

/// A `T` in memory outside of the kernel, mapped as normal, cached memory.
///
/// # Examples
///
/// ```ignore
/// let words = Mapping::<[Atomic<u64>; 2]>::new(&Range::new(address, 16)?)?;
/// let first = words[0].load(Relaxed);
/// ```
///
/// # Invariants
///
/// Points at a `T` in a mapping of `memremap()` that this value owns.
pub(crate) struct Mapping<T: Shared>(NonNull<T>);

impl<T: Shared> Mapping<T> {
    /// Maps the beginning of `range`.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: `range` is too short, or not aligned, for a `T`.
    /// - `ENOMEM`: there is no room for the mapping.
    pub(crate) fn new(range: &Range) -> Result<Self> {
        if size_of::<T>() > range.len || range.start % align_of::<T>() as u64 != 0 {
            return Err(EINVAL);
        }

        // SAFETY: By its invariants, the range is outside of System RAM, and `memremap()` refuses a
        // range that it cannot map. The driver trusts the firmware that loads have no side effects.
        // In a confidential guest `MEMREMAP_DEC` maps the memory as shared with the hypervisor.
        let virt = unsafe {
            bindings::memremap(
                range.start,
                size_of::<T>(),
                c_ulong_of(bindings::MEMREMAP_WB | bindings::MEMREMAP_DEC),
            )
        };

        // INVARIANT: The mapping is new, so it is ours. It is aligned as the address is, and it
        // holds a `T`, since every bit pattern is one.
        NonNull::new(virt.cast()).map(Self).ok_or(ENOMEM)
    }
}

impl<T: Shared> Deref for Mapping<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: By the type invariants, and since `T` is `Shared`.
        unsafe { self.0.as_ref() }
    }
}

impl<T: Shared> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the mapping is ours.
        unsafe { bindings::memunmap(self.0.as_ptr().cast()) };
    }
}

// SAFETY: Any thread can unmap it.
unsafe impl<T: Shared + Send> Send for Mapping<T> {}

// SAFETY: A shared reference gives only a shared reference to the `T`.
unsafe impl<T: Shared + Sync> Sync for Mapping<T> {}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_address)]
mod tests {
    use super::*;

    const BEYOND: &str = "is beyond the physical address width";

    /// Returns the error for a range.
    fn wrong(start: u64, len: usize) -> Option<&'static str> {
        Range::new(start, len).err()
    }

    /// An unchecked range, for functions that do not access memory: without the type invariants.
    fn unchecked(start: u64, len: usize) -> Range {
        Range { start, len }
    }

    #[test]
    fn no_range_ends_beyond_the_address_space() {
        assert_eq!(wrong(u64::MAX, 1), Some(BEYOND));
        assert_eq!(wrong(u64::MAX - 7, 16), Some(BEYOND));
        assert_eq!(wrong(u64::MAX - 15, 16), Some(BEYOND));
        assert_eq!(wrong(1 << 63, 16), Some(BEYOND));
        // x86 has at most 52 bits of physical address.
        assert_eq!(wrong(1 << 52, 16), Some(BEYOND));
        assert_eq!(wrong((1 << 52) - 8, 16), Some(BEYOND));
        assert_eq!(wrong(!(PAGE_SIZE as u64 - 1), PAGE_SIZE), Some(BEYOND));
    }

    #[test]
    fn a_range_is_not_empty() {
        assert!(wrong(0xe_0000, 0).is_some());
    }

    #[test]
    fn no_byte_is_in_system_ram() {
        // Usable memory at 16 MiB: the kernel's default address.
        for address in [0x100_0000, 0x100_0ff8] {
            assert_eq!(wrong(address, 16), Some("is in System RAM"));
        }
    }

    #[test]
    fn ranges_overlap_when_they_share_a_byte() {
        let page = unchecked(0x1000, 0x1000);
        for (start, len, overlaps) in [
            (0x0, 0x1000, false),
            (0x0, 0x1001, true),
            (0xff8, 16, true),
            (0xff0, 16, false),
            (0x1000, 1, true),
            (0x1ff8, 16, true),
            (0x1fff, 1, true),
            (0x2000, 16, false),
            (0x0, 0x10000, true),
        ] {
            let other = unchecked(start, len);
            assert_eq!(page.overlaps(&other), overlaps);
            assert_eq!(other.overlaps(&page), overlaps);
        }
    }

    #[test]
    fn ranges_at_the_top_do_not_wrap() {
        let top = unchecked(u64::MAX - 0x1fff, 0x1000);
        assert!(!top.overlaps(&unchecked(0, 0x1000)));
        assert!(top.overlaps(&unchecked(u64::MAX - 0x1000 - 8, 16)));
    }

    #[test]
    fn a_counter_has_a_whole_page() {
        for start in [1, 8, 0x28, 0x800, 0xe_0fff] {
            let page = ReservedPage::new(start);
            assert_eq!(page.err(), Some("is not page aligned"));
        }
    }

    #[test]
    fn the_chipset_is_no_memory() {
        for (start, len, chipset) in [
            (0xfebf_f000, 0x1000, false),
            (0xfebf_f000, 0x1001, true),
            (0xfec0_0000, 0x1000, true),
            (0xfee0_0000, 0x1000, true),
            (0xffff_f000, 0x1000, true),
        ] {
            let range = unchecked(start, len);
            // Below the chipset, PCI's window can be: that also counts as a device.
            assert!(range.has_device() || !chipset);
        }
        assert!(!unchecked(1 << 38, 0x1000).has_device());
    }

    #[test]
    fn not_every_hole_is_reserved() {
        // The graphics card's memory of a PC, and an address above all of the RAM.
        for start in [0xa_0000, 1 << 38] {
            let page = ReservedPage::new(start);
            assert_eq!(
                page.err(),
                Some("is not in memory that the firmware reserved")
            );
        }
    }
}
