// SPDX-License-Identifier: GPL-2.0

//! Memory that the firmware has reserved, and that the hypervisor writes to.
//!
//! C headers: [`include/linux/io.h`](srctree/include/linux/io.h),
//! [`include/linux/ioport.h`](srctree/include/linux/ioport.h)

use super::prelude::*;
use core::ops::Deref;

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
    /// - `ERANGE`: It is empty, or ends beyond the physical address space.
    /// - `EBUSY`: A byte of it is in System RAM.
    pub(crate) fn new(start: u64, len: usize) -> Result<Self> {
        match start.checked_add(len as u64) {
            Some(end) if len > 0 && end - 1 <= last_address() => (),
            _ => return Err(ERANGE),
        }

        // SAFETY: The function only looks addresses up.
        let system_ram = unsafe {
            bindings::region_intersects(
                start,
                len,
                bindings::IORESOURCE_SYSTEM_RAM as c_ulong,
                bindings::IORES_DESC_NONE as c_ulong,
            )
        };
        if system_ram != bindings::REGION_DISJOINT as c_int {
            return Err(EBUSY);
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

    /// Returns whether the firmware's memory map lists every byte of the range as reserved or as
    /// ACPI non-volatile storage.
    #[cfg(not(all(CONFIG_ARM64, CONFIG_EFI)))]
    fn is_reserved(&self) -> bool {
        /// # Safety
        ///
        /// `res` must be valid, and `sum` point exclusively at a `u64`.
        unsafe extern "C" fn add(res: *mut bindings::resource, sum: *mut c_void) -> c_int {
            // SAFETY: By the safety requirements.
            let (res, sum) = unsafe { (&*res, &mut *sum.cast::<u64>()) };
            *sum += res.end - res.start + 1;
            0
        }

        let mut sum: u64 = 0;
        for desc in RESERVED {
            // Entries of the firmware's map do not overlap, so no byte is counted twice.
            //
            // SAFETY: `add` gets valid resources, clipped to the range, and the pointer to `sum`.
            unsafe {
                bindings::walk_iomem_res_desc(
                    desc as c_ulong,
                    bindings::IORESOURCE_MEM as c_ulong,
                    self.start,
                    self.start + self.len as u64 - 1,
                    (&raw mut sum).cast(),
                    Some(add),
                )
            };
        }
        sum == self.len as u64
    }

    /// The same on arm64, where resources do not have the types of the firmware's map.
    #[cfg(all(CONFIG_ARM64, CONFIG_EFI))]
    fn is_reserved(&self) -> bool {
        /// `EFI_PAGE_SIZE` of `linux/efi.h`, which bindgen cannot evaluate.
        const EFI_PAGE_SIZE: usize = 4096;

        let end = self.start + self.len as u64;
        (self.start..end).step_by(EFI_PAGE_SIZE).all(|address| {
            let mut entry = bindings::efi_memory_desc_t::default();
            // SAFETY: The function only looks the address up, and writes to `entry`.
            let found = unsafe { bindings::efi_mem_desc_lookup(address, &mut entry) } == 0;
            found && RESERVED.contains(&entry.type_)
        })
    }
}

/// Returns the last address of the processor's physical address width.
fn last_address() -> u64 {
    // SAFETY: The kernel sets `end` at boot, from the width.
    #[cfg(not(CONFIG_ARM64))]
    unsafe {
        bindings::iomem_resource.end
    }
    // On arm64 `end` is the last number of 64 bits.
    #[cfg(CONFIG_ARM64)]
    {
        /// `SYS_ID_AA64MMFR0_EL1` of `asm/sysreg.h`, which bindgen cannot evaluate.
        const SYS_ID_AA64MMFR0_EL1: u32 = 0x18_0700;

        // SAFETY: The kernel knows the register, and has read it at boot.
        let parange = unsafe { bindings::read_sanitised_ftr_reg(SYS_ID_AA64MMFR0_EL1) } & 0xf;
        let bits = [32, 36, 40, 42, 44, 48].get(parange as usize).copied();
        (1 << bits.unwrap_or(bindings::CONFIG_ARM64_PA_BITS)) - 1
    }
}

/// The types of memory that the firmware has reserved.
#[cfg(not(all(CONFIG_ARM64, CONFIG_EFI)))]
const RESERVED: [u32; 2] = [
    bindings::IORES_DESC_RESERVED,
    bindings::IORES_DESC_ACPI_NV_STORAGE,
];
#[cfg(all(CONFIG_ARM64, CONFIG_EFI))]
const RESERVED: [u32; 2] = [bindings::EFI_RESERVED_TYPE, bindings::EFI_ACPI_MEMORY_NVS];

/// A page that the firmware has reserved.
///
/// # Invariants
///
/// The range is one whole, aligned page. Either the firmware's map listed every byte as reserved or
/// as ACPI non-volatile storage when it was checked, or the firmware lists it as memory of a device.
#[derive(Clone, Copy)]
pub(crate) struct ReservedPage(Range);

impl ReservedPage {
    /// Checks the page at the physical address `start`.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: The address is not page aligned.
    /// - `ENXIO`: The firmware has not reserved the page.
    ///
    /// And those of [`Range::new`].
    pub(crate) fn new(start: u64) -> Result<Self> {
        let range = Self::aligned(start)?;
        if !range.is_reserved() {
            return Err(ENXIO);
        }
        // INVARIANT: Checked above.
        Ok(Self(range))
    }

    /// Checks the first page of `len` bytes at `start`, which the firmware lists as a device's memory.
    ///
    /// # Errors
    ///
    /// `ENOSPC`: It is shorter than a page. And those of [`ReservedPage::new`], without `ENXIO`.
    pub(crate) fn of_device(start: u64, len: u64) -> Result<Self> {
        if len < PAGE_SIZE as u64 {
            return Err(ENOSPC);
        }
        // INVARIANT: Checked above and by the callee.
        Self::aligned(start).map(Self)
    }

    fn aligned(start: u64) -> Result<Range> {
        if start % PAGE_SIZE as u64 != 0 {
            return Err(EINVAL);
        }
        Range::new(start, PAGE_SIZE)
    }

    /// Returns the page as a range of addresses.
    pub(crate) fn range(&self) -> &Range {
        &self.0
    }
}

/// `N` words of memory outside of the kernel, mapped as normal, cached memory. The hypervisor writes
/// to them at any time.
///
/// # Examples
///
/// ```ignore
/// let words = Mapping::<u64, 2>::new(&Range::new(address, 16)?)?;
/// let first = words[0].load(Relaxed);
/// ```
///
/// # Invariants
///
/// Points at `N` words, each aligned, in a mapping of `memremap()` that this value owns.
pub(crate) struct Mapping<T: AtomicType + FromBytes, const N: usize>(NonNull<[Atomic<T>; N]>);

impl<T: AtomicType + FromBytes, const N: usize> Mapping<T, N> {
    /// Maps the beginning of `range`.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: `range` is too short, or not aligned.
    /// - `ENOMEM`: There is no room for the mapping.
    pub(crate) fn new(range: &Range) -> Result<Self> {
        if size_of::<[T; N]>() > range.len || range.start % align_of::<T>() as u64 != 0 {
            return Err(EINVAL);
        }

        // SAFETY: By its invariants, the range is outside of System RAM, and `memremap()` refuses a
        // range that it cannot map. The driver trusts the firmware that loads have no side effects.
        // In a confidential guest `MEMREMAP_DEC` maps the memory as shared with the hypervisor.
        let virt = unsafe {
            bindings::memremap(
                range.start,
                size_of::<[T; N]>(),
                (bindings::MEMREMAP_WB | bindings::MEMREMAP_DEC) as c_ulong,
            )
        };

        // INVARIANT: The mapping is new, so it is ours. It is aligned as the address is.
        NonNull::new(virt.cast()).map(Self).ok_or(ENOMEM)
    }
}

impl<T: AtomicType + FromBytes, const N: usize> Deref for Mapping<T, N> {
    type Target = [Atomic<T>; N];

    fn deref(&self) -> &Self::Target {
        // SAFETY: By the type invariants the words are valid. By `FromBytes` every bit pattern is a
        // `T`, and all accesses are atomic.
        unsafe { self.0.as_ref() }
    }
}

impl<T: AtomicType + FromBytes, const N: usize> Drop for Mapping<T, N> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the mapping is ours.
        unsafe { bindings::memunmap(self.0.as_ptr().cast()) };
    }
}

// SAFETY: Any thread can unmap it.
unsafe impl<T: AtomicType + FromBytes, const N: usize> Send for Mapping<T, N> {}

// SAFETY: A shared reference gives atomic accesses only.
unsafe impl<T: AtomicType + FromBytes, const N: usize> Sync for Mapping<T, N> {}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_address)]
mod tests {
    use super::*;

    /// Returns the error for a range.
    fn wrong(start: u64, len: usize) -> Option<Error> {
        Range::new(start, len).err()
    }

    /// An unchecked range, for functions that do not access memory: without the type invariants.
    fn unchecked(start: u64, len: usize) -> Range {
        Range { start, len }
    }

    #[test]
    fn no_range_ends_beyond_the_address_space() {
        assert_eq!(wrong(u64::MAX, 1), Some(ERANGE));
        assert_eq!(wrong(u64::MAX - 7, 16), Some(ERANGE));
        assert_eq!(wrong(u64::MAX - 15, 16), Some(ERANGE));
        assert_eq!(wrong(1 << 63, 16), Some(ERANGE));
        // x86 and arm64 have at most 52 bits of physical address.
        assert_eq!(wrong(1 << 52, 16), Some(ERANGE));
        assert_eq!(wrong((1 << 52) - 8, 16), Some(ERANGE));
        assert_eq!(wrong(!(PAGE_SIZE as u64 - 1), PAGE_SIZE), Some(ERANGE));
    }

    #[test]
    fn a_range_is_not_empty() {
        assert_eq!(wrong(0xe_0000, 0), Some(ERANGE));
    }

    #[test]
    fn no_byte_is_in_system_ram() {
        /// # Safety
        ///
        /// `res` must be valid, and `start` point exclusively at a `u64`.
        unsafe extern "C" fn first(res: *mut bindings::resource, start: *mut c_void) -> c_int {
            // SAFETY: By the safety requirements.
            unsafe { *start.cast::<u64>() = (*res).start };
            1
        }

        let mut ram: u64 = 0;
        // SAFETY: `first` gets a valid resource, and the pointer to `ram`.
        let found = unsafe {
            bindings::walk_iomem_res_desc(
                bindings::IORES_DESC_NONE as c_ulong,
                bindings::IORESOURCE_SYSTEM_RAM as c_ulong,
                0,
                u64::MAX,
                (&raw mut ram).cast(),
                Some(first),
            )
        };
        assert_eq!(found, 1);
        for address in [ram, ram + 0xff8] {
            assert_eq!(wrong(address, 16), Some(EBUSY));
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
            assert_eq!(page.err(), Some(EINVAL));
        }
    }

    /// On arm64 with UEFI, a page of each entry in the firmware's map: its type decides.
    #[test]
    fn the_firmwares_map_says_what_is_reserved() {
        #[cfg(all(CONFIG_ARM64, CONFIG_EFI))]
        for address in (0..1 << 31).step_by(0x1_0000) {
            let mut entry = bindings::efi_memory_desc_t::default();
            // SAFETY: The function only looks the address up, and writes to `entry`.
            let found = unsafe { bindings::efi_mem_desc_lookup(address, &mut entry) } == 0;
            if found && Range::new(address, PAGE_SIZE).is_ok() {
                let reserved = RESERVED.contains(&entry.type_);
                assert_eq!(ReservedPage::new(address).is_ok(), reserved);
            }
        }
    }

    #[test]
    fn not_every_hole_is_reserved() {
        // The graphics card's memory of a PC, and an address above all of the RAM.
        for start in [0xa_0000, 1 << 38] {
            let page = ReservedPage::new(start);
            assert_eq!(page.err(), Some(ENXIO));
        }
    }
}
