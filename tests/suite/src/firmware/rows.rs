// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tables of firmware, one row each, and the outcome that each has to have.

use super::table;

/// A device, in a table of its own.
pub struct Row {
    pub name: String,
    /// The objects by which the system identifies the device.
    pub names: &'static str,
    /// The objects in the device.
    pub asl: String,
    /// The objects outside of it.
    pub outside: &'static str,
    /// Bytes of the AML, and the bytes that replace them.
    pub patch: Option<(&'static [u8], &'static [u8])>,
    /// The outcome where nothing else is bound.
    pub outcome: Outcome,
    /// The outcome beside a sound device that has the node, where it differs from `outcome` by more
    /// than the missing node.
    pub beside: Option<Outcome>,
    /// The counter at the address in `CTRA`, where it is not the row's own.
    pub counter: Option<u32>,
}

/// What becomes of a device.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// No driver: the system does not see the device.
    Nothing,
    /// No driver, because there is no generation ID. The driver logs one line.
    Missing,
    /// No driver, because of an error in `ADDR`.
    Refused(String),
    /// Reseeding only, because of an error in `CTRA`, if there is one.
    Reseeds(Option<String>),
    /// The device node, and no line in the log.
    Node,
    /// It has a test of its own.
    Various,
}

const NAMES: &str = r#"Name (_HID, "VMGENCTR")"#;

/// The two objects, as they should be.
const ADDR: &str = "Name (ADDR, Package () { <id>, 0 })";
const CTRA: &str = "Name (CTRA, Package () { <page>, 0 })";

/// The ID of Firecracker's guests on x86, below 1 MiB.
const FIRECRACKER: &str = "Name (ADDR, Package () { 0x000DFFF0, 0 })";

const NOT_A_PACKAGE: &str = "is not a package";
const NOT_TWO: &str = "is not a package of two elements";
const NOT_INTEGER: &str = "has an element that is not an integer";
const FAILS: &str = "cannot be evaluated";
const ZERO: &str = "is zero";
const BEYOND: &str = "is beyond the physical address width";
pub const RAM: &str = "is in System RAM";
const UNALIGNED: &str = "is not 8-byte aligned";
const NOT_A_PAGE: &str = "is not page aligned";
const NOT_RESERVED: &str = "is not in memory that the firmware reserved";
const SECRET: &str = "holds a generation ID";
pub const PUBLIC: &str = "is in the page of a generation counter";

/// The line about a second device.
pub const SECOND: &str = "another device has /dev/vmgenid: reseeding only";

/// What can be wrong with either object: `@` is its name, `<at>` the address
/// that would be right.
const WRONG: &[(&str, &str, &str)] = &[
    ("is_an_integer", "Name (@, <at>)", NOT_A_PACKAGE),
    ("is_a_string", r#"Name (@, "<at>")"#, NOT_A_PACKAGE),
    (
        "is_a_buffer",
        "Name (@, Buffer () { 0, 0, 0, 9, 0, 0, 0, 0 })",
        NOT_A_PACKAGE,
    ),
    (
        "is_a_field",
        "OperationRegion (REG, SystemMemory, <base>, 0x100)
         Field (REG, DWordAcc, NoLock, Preserve) { @, 32 }",
        NOT_A_PACKAGE,
    ),
    ("is_a_device", "Device (@) {}", FAILS),
    ("is_a_mutex", "Mutex (@, 0)", FAILS),
    (
        "is_an_operation_region",
        "OperationRegion (@, SystemMemory, <base>, 0x100)",
        FAILS,
    ),
    ("is_an_empty_package", "Name (@, Package () {})", NOT_TWO),
    ("has_1_element", "Name (@, Package () { <at> })", NOT_TWO),
    (
        "has_3_elements",
        "Name (@, Package () { <at>, 0, 0 })",
        NOT_TWO,
    ),
    (
        "has_3_elements_of_which_1_is_missing",
        "Name (@, Package (3) { <at>, 0 })",
        NOT_TWO,
    ),
    (
        "has_20000_elements",
        "Method (@) { Local0 = 20000 Local1 = Package (Local0) {} Return (Local1) }",
        NOT_TWO,
    ),
    (
        "is_a_package_in_a_package",
        "Name (@, Package () { Package () { <at>, 0 } })",
        NOT_TWO,
    ),
    (
        "is_two_packages",
        "Name (@, Package () { Package () { <at> }, Package () { 0 } })",
        NOT_INTEGER,
    ),
    (
        "is_packages_all_the_way_down",
        "Name (@, Package () { <at>, Package () { Package () { Package () { Package () {} } } } })",
        NOT_INTEGER,
    ),
    (
        "is_two_strings",
        r#"Name (@, Package () { "<at>", "0" })"#,
        NOT_INTEGER,
    ),
    (
        "is_two_buffers",
        "Name (@, Package () { Buffer () { 0, 0, 0, 9 }, Buffer () { 0, 0, 0, 0 } })",
        NOT_INTEGER,
    ),
    (
        "has_a_device_in_it",
        "Device (DEV) {} Name (@, Package () { <at>, DEV })",
        NOT_INTEGER,
    ),
    (
        "has_a_method_in_it",
        "Method (MET) { Return (0) } Name (@, Package () { <at>, MET })",
        NOT_INTEGER,
    ),
    (
        "has_a_name_in_it_that_is_missing",
        "External (GONE, UnknownObj) Name (@, Package () { <at>, GONE })",
        NOT_INTEGER,
    ),
    (
        "has_an_element_that_was_left_out",
        "Name (@, Package (2) { <at> })",
        NOT_INTEGER,
    ),
    ("is_zero", "Name (@, Package () { 0, 0 })", ZERO),
    (
        "is_in_system_ram",
        "Name (@, Package () { 0x04000000, 0 })",
        RAM,
    ),
    (
        "is_in_the_kernel",
        "Name (@, Package () { 0x01000000, 0 })",
        RAM,
    ),
    (
        "is_in_ram_above_4_gib",
        "Name (@, Package () { 0x01000000, 1 })",
        RAM,
    ),
    (
        "begins_in_ram_and_ends_in_reserved_memory",
        "Name (@, Package () { <before>, 0 })",
        RAM,
    ),
    (
        "begins_in_reserved_memory_and_ends_in_ram",
        "Name (@, Package () { <after>, 0 })",
        RAM,
    ),
    (
        "is_the_first_address_beyond_the_width",
        "Name (@, Package () { 0, 0x100 })",
        BEYOND,
    ),
    (
        "ends_at_the_top_of_the_address_space",
        "Name (@, Package () { <top>, 0xFFFFFFFF })",
        BEYOND,
    ),
    (
        "names_what_is_missing",
        "External (GONE, UnknownObj) Method (@) { Return (GONE) }",
        FAILS,
    ),
    (
        "divides_by_zero",
        "Method (@) { Local0 = 0 Local1 = 1 / Local0 Return (Package () { <at>, 0 }) }",
        FAILS,
    ),
    (
        "looks_beyond_a_package",
        "Method (@) { Local0 = 5 Return (DerefOf (Index (Package () { <at>, 0 }, Local0))) }",
        FAILS,
    ),
    ("calls_itself", "Method (@) { Return (@ ()) }", FAILS),
    (
        // ACPICA is lenient: it supplies the missing argument, and converts the returned value to
        // an integer.
        "wants_an_argument",
        "Method (@, 1) { Return (Arg0) }",
        NOT_A_PACKAGE,
    ),
    (
        "reads_a_local_that_it_never_wrote",
        "Method (@) { Return (Local0) }",
        NOT_A_PACKAGE,
    ),
    ("is_fatal", "Method (@) { Fatal (2, 0x12345678, 0) }", FAILS),
    // ACPICA is lenient here as well.
    ("returns_nothing", "Method (@) {}", NOT_A_PACKAGE),
    (
        "returns_what_it_did_last",
        "Method (@) { Local0 = <at> }",
        NOT_A_PACKAGE,
    ),
    (
        "returns_a_device",
        "Device (DEV) {} Method (@) { Return (DEV) }",
        FAILS,
    ),
    (
        "returns_an_index",
        "Name (PAK, Package () { <at>, 0 }) Method (@) { Return (Index (PAK, 0)) }",
        NOT_A_PACKAGE,
    ),
];

/// Errors in `ADDR` only.
const WRONG_ADDR: &[(&str, &str, &str)] = &[
    (
        "addr_is_all_ones",
        "Name (ADDR, Package () { 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF })",
        UNALIGNED,
    ),
    (
        "addr_is_aligned_to_4_bytes",
        "Name (ADDR, Package () { <id+4>, 0 })",
        UNALIGNED,
    ),
    (
        "addr_is_odd",
        "Name (ADDR, Package () { <id+1>, 0 })",
        UNALIGNED,
    ),
    (
        "addr_overflows",
        "Name (ADDR, Package () { 0xFFFFFFF8, 0xFFFFFFFF })",
        BEYOND,
    ),
    (
        "addr_has_8_bytes_beyond_the_width",
        "Name (ADDR, Package () { 0xFFFFFFF8, 0xFF })",
        BEYOND,
    ),
];

/// Errors in `CTRA` only, on any machine.
const WRONG_CTRA: &[(&str, &str, &str)] = &[
    (
        "ctra_is_all_ones",
        "Name (CTRA, Package () { 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF })",
        NOT_A_PAGE,
    ),
    (
        "ctra_is_aligned_to_8_bytes",
        "Name (CTRA, Package () { <page+8>, 0 })",
        NOT_A_PAGE,
    ),
    (
        "ctra_is_aligned_to_2048_bytes",
        "Name (CTRA, Package () { <page+0x800>, 0 })",
        NOT_A_PAGE,
    ),
    (
        "ctra_is_the_ids_page",
        "Name (CTRA, Package () { <base>, 0 })",
        SECRET,
    ),
    (
        "ctra_is_in_a_pci_hole",
        "Name (CTRA, Package () { 0xD0000000, 0 })",
        NOT_RESERVED,
    ),
    (
        "ctra_is_in_acpi_tables",
        "Name (CTRA, Package () { 0x0A100000, 0 })",
        NOT_RESERVED,
    ),
    (
        "ctra_is_half_in_a_pci_hole",
        "Name (CTRA, Package () { 0xC0000000, 0 })",
        NOT_RESERVED,
    ),
    (
        "ctra_is_the_io_apic",
        "Name (CTRA, Package () { 0xFEC00000, 0 })",
        NOT_RESERVED,
    ),
    (
        "ctra_is_the_hpet",
        "Name (CTRA, Package () { 0xFED00000, 0 })",
        NOT_RESERVED,
    ),
    (
        "ctra_is_the_local_apic",
        "Name (CTRA, Package () { 0xFEE00000, 0 })",
        NOT_RESERVED,
    ),
    (
        "ctra_is_the_video_rom",
        "Name (CTRA, Package () { 0x000C0000, 0 })",
        NOT_RESERVED,
    ),
    (
        "ctra_is_a_pci_bar",
        "Name (CTRA, Package () { <bar>, 0 })",
        NOT_RESERVED,
    ),
];

/// Valid tables in other forms. The second string is the whole ASL.
const SOUND: &[(&str, &str)] = &[
    // QEMU's DSDT is of revision 1: the system cuts all integers to 32 bits
    // before the driver sees them.
    (
        "halves_of_33_bits_where_integers_have_32",
        "Name (ADDR, Package () { <id+0x100000000>, 0x100000000 })
         Name (CTRA, Package () { <page+0x100000000>, 0x100000000 })",
    ),
    ("names", "<ADDR> <CTRA>"),
    (
        "methods",
        "Method (ADDR) { Return (Package () { <id>, 0 }) }
         Method (CTRA, 0, Serialized) { Local0 = Package (2) {} Local0[0] = <page> Local0[1] = 0 Return (Local0) }",
    ),
    (
        "packages_of_names",
        "Name (ILO, <id>) Name (CLO, <page>) Name (HIGH, 0)
         Name (ADDR, Package () { ILO, HIGH }) Name (CTRA, Package () { CLO, HIGH })",
    ),
    (
        "packages_by_reference",
        "Name (PAK, Package () { <id>, 0 }) Name (PAC, Package () { <page>, 0 })
         Method (ADDR) { Return (RefOf (PAK)) } Method (CTRA) { Return (RefOf (PAC)) }",
    ),
    (
        "packages_of_a_length_known_later",
        "Method (ADDR) { Local0 = 2 Return (Package (Local0) { <id>, 0 }) } <CTRA>",
    ),
    (
        "methods_that_sleep",
        "Method (ADDR) { Sleep (50) Return (Package () { <id>, 0 }) }
         Method (CTRA) { Sleep (50) Return (Package () { <page>, 0 }) }",
    ),
    (
        "methods_that_loop",
        "Method (ADDR) { Local0 = <rounds> While (Local0) { Local0-- } Return (Package () { <id>, 0 }) }
         Method (CTRA) { Local0 = <rounds> While (Local0) { Local0-- } Return (Package () { <page>, 0 }) }",
    ),
    (
        "a_notification_before_the_handler_is_there",
        "Method (ADDR) { Notify (<self>, 0x80) Return (Package () { <id>, 0 }) } <CTRA>",
    ),
    (
        "a_notification_before_probe_ends",
        "<ADDR> Method (CTRA) { Notify (<self>, 0x80) Return (Package () { <page>, 0 }) }",
    ),
    (
        "notifications_of_every_value",
        "Method (ALL) { Local0 = 0 While (Local0 < 0x100) { Notify (<self>, Local0) Local0++ } }
         Method (ADDR) { ALL () Return (Package () { <id>, 0 }) }
         Method (CTRA) { ALL () Return (Package () { <page>, 0 }) }",
    ),
    (
        "a_storm_before_probe_ends",
        // The storm has parts: the system ends a loop that takes 30 seconds.
        "<ADDR>
         Method (PART) { Local0 = <rounds> / 100 While (Local0) { Notify (<self>, 0x80) Local0-- } }
         Method (PARS)
         {
             PART () PART () PART () PART () PART () PART () PART () PART () PART () PART ()
         }
         Method (CTRA)
         {
             PARS () PARS () PARS () PARS () PARS () PARS () PARS () PARS () PARS () PARS ()
             Return (Package () { <page>, 0 })
         }",
    ),
    (
        "an_id_that_ends_where_the_page_begins",
        "Name (ADDR, Package () { <page-16>, 0 }) <CTRA>",
    ),
    (
        "an_id_that_begins_where_the_page_ends",
        "Name (ADDR, Package () { <page+0x1000>, 0 }) <CTRA>",
    ),
    (
        "a_resource_over_the_page",
        "<ADDR> <CTRA>
         Name (_CRS, ResourceTemplate () { Memory32Fixed (ReadWrite, <base>, 0x2000) })",
    ),
];

/// The rows of a PC that are about `ADDR`. The rows have two lists, since the system accepts at
/// most 128 tables.
pub fn pc_addr() -> Vec<Row> {
    pc_with(|name| name.starts_with("addr_"))
}

/// The other rows of a PC.
pub fn pc() -> Vec<Row> {
    pc_with(|name| !name.starts_with("addr_"))
}

/// The sound device comes first: the others are tested beside it.
fn pc_with(wanted: impl Fn(&str) -> bool) -> Vec<Row> {
    let mut rows = all_of_pc();
    rows.retain(|row| row.name == "sound" || wanted(&row.name));
    rows
}

fn all_of_pc() -> Vec<Row> {
    let mut rows = vec![
        row("sound", "<ADDR> <CTRA>", Outcome::Node),
        // ADDR and CTRA are in the scope above, where a lookup finds them.
        Row {
            outside: "Name (\\_SB.ADDR, Package () { <id>, 0 }) Name (\\_SB.CTRA, Package () { <page>, 0 })",
            ..row("addr_is_missing", "<CTRA>", Outcome::Missing)
        },
        row("both_are_missing", "", Outcome::Missing),
        row("ctra_is_missing", "<ADDR>", Outcome::Reseeds(None)),
        row(
            "both_are_wrong",
            "Name (ADDR, 0) Name (CTRA, 0)",
            refused(NOT_A_PACKAGE),
        ),
        row(
            "addr_is_in_a_pci_hole",
            "Name (ADDR, Package () { 0xD0000000, 0 })",
            Outcome::Reseeds(None),
        ),
        row(
            "addr_is_a_pci_bar",
            "Name (ADDR, Package () { <bar>, 0 })",
            Outcome::Reseeds(None),
        ),
        row(
            "addr_is_the_io_apic",
            "Name (ADDR, Package () { 0xFEC00000, 0 })",
            Outcome::Reseeds(None),
        ),
        row(
            "addr_is_the_local_apic",
            "Name (ADDR, Package () { 0xFEE00000, 0 })",
            Outcome::Reseeds(None),
        ),
        row(
            "addr_is_in_the_bios_rom",
            "Name (ADDR, Package () { 0x000F0000, 0 })",
            Outcome::Reseeds(None),
        ),
        row(
            "addr_is_in_the_last_16_bytes_of_the_width",
            "Name (ADDR, Package () { 0xFFFFFFF0, 0xFF })",
            Outcome::Reseeds(None),
        ),
        row(
            "addr_leaves_reserved_memory_for_a_pci_hole",
            "Name (ADDR, Package () { 0xC00007F8, 0 })",
            Outcome::Reseeds(None),
        ),
        row(
            "ctra_holds_the_ids_last_8_bytes",
            "Name (ADDR, Package () { <page-8>, 0 }) <CTRA>",
            reseeds(SECRET),
        ),
        row(
            "ctra_holds_the_ids_first_8_bytes",
            "Name (ADDR, Package () { <page+0xff8>, 0 }) <CTRA>",
            reseeds(SECRET),
        ),
        row(
            "the_device_is_absent",
            "<ADDR> <CTRA> Method (_STA) { Return (0) }",
            Outcome::Nothing,
        ),
        Row {
            names: r#"Name (_HID, "QEMUVGID") Name (_CID, "VM_Gen_Counter")"#,
            ..row("sound_by_its_cid", "<ADDR> <CTRA>", Outcome::Node)
        },
        Row {
            names: r#"Name (_HID, "VMGT0001") Name (_CID, Package () { "VMGT0002", "VMGENCTR", "VM_GEN_COUNTER" })"#,
            ..row("sound_by_one_of_its_cids", "<ADDR> <CTRA>", Outcome::Node)
        },
        // The tables of hypervisors' own firmware, which has no CTRA.
        Row {
            names: r#"Name (_HID, "VMGENCTR") Name (_CID, "VM_Gen_Counter") Name (_DDN, "VM_Gen_Counter")"#,
            ..row("firecracker_1_16", FIRECRACKER, Outcome::Reseeds(None))
        },
        Row {
            names: r#"Name (_HID, "FCVMGID") Name (_CID, "VM_Gen_Counter") Name (_DDN, "VM_Gen_Counter")"#,
            ..row("firecracker_1_15", FIRECRACKER, Outcome::Reseeds(None))
        },
        Row {
            names: r#"Name (_HID, "Hyper_V_Gen_Counter_V1") Name (_CID, "VM_Gen_Counter") Name (_DDN, "VM_Gen_Counter")"#,
            ..row(
                "hyper_v",
                "Name (GCAL, <id>) Name (GCAH, 0)
                 Method (ADDR)
                 {
                     Name (LPKG, Package (2) { 0, 0 })
                     LPKG[0] = GCAL
                     LPKG[1] = GCAH
                     Return (LPKG)
                 }",
                Outcome::Reseeds(None),
            )
        },
        // A package with 3 elements that announces 2. The compiler counts the elements, so the AML
        // is patched.
        Row {
            patch: Some((
                b"\x03\x0c\x00\x30\x22\x11\x0c\x88\x77\x66\x55",
                b"\x02\x0c\x00\x30\x22\x11\x0c\x88\x77\x66\x55",
            )),
            ..row(
                "ctra_has_an_element_more_than_it_says",
                "<ADDR> Name (CTRA, Package () { 0x11223000, 0x55667788, 0 })",
                reseeds(BEYOND),
            )
        },
        // Opcodes that do not exist: ACPICA logs them, and skips them.
        Row {
            patch: Some((b"\x0c\x44\x33\x22\x11", b"\x5b\xff\x5b\xff\x5b")),
            ..row(
                "sound_with_unknown_opcodes",
                "<ADDR> Method (CTRA) { Local0 = 0x11223344 Return (Package () { <page>, 0 }) }",
                Outcome::Node,
            )
        },
        row(
            "sound_in_acpi_nvs",
            format!("<ADDR> {}", elsewhere("0x0A000000", "0x0A000000, 0")),
            Outcome::Node,
        ),
        row(
            "sound_half_reserved_and_half_acpi_nvs",
            format!("<ADDR> {}", elsewhere("0x0A300000", "0x0A300000, 0")),
            Outcome::Node,
        ),
        // The DSDT's integers have 32 bits, so that the table cannot put a
        // counter there.
        Row {
            counter: Some(0),
            ..row(
                "sound_above_4_gib",
                "Name (ADDR, Package () { 0x02000000, 1 })
                 Name (CTRA, Package () { 0x02001000, 1 })",
                Outcome::Node,
            )
        },
        row(
            "sound_with_the_id_of_another",
            "Name (ADDR, Package () { <sound id>, 0 }) <CTRA>",
            Outcome::Node,
        ),
        Row {
            counter: Some(table::counter(0)),
            ..row(
                "sound_with_the_counter_of_another",
                "<ADDR> Name (CTRA, Package () { <sound page>, 0 })",
                Outcome::Node,
            )
        },
        // While the other device is not bound, the driver cannot know of its ID.
        Row {
            beside: Some(reseeds(SECRET)),
            counter: Some(0),
            ..row(
                "ctra_is_the_page_of_anothers_id",
                "<ADDR> Name (CTRA, Package () { <sound page-0x1000>, 0 })",
                Outcome::Node,
            )
        },
        Row {
            beside: Some(refused(PUBLIC)),
            ..row(
                "addr_is_in_the_counters_page_of_another",
                "Name (ADDR, Package () { <sound page+8>, 0 })",
                Outcome::Reseeds(None),
            )
        },
        row(
            "notifying",
            "<ADDR> <CTRA> Method (_SUN) { ID0++ CNT++ Notify (<self>, 0x80) Return (0) }",
            Outcome::Various,
        ),
        // The storm has parts, as the one above.
        row(
            "storming",
            "<ADDR> <CTRA>
             Method (HUND) { Local0 = 100 While (Local0) { Notify (<self>, 0x80) Local0-- } }
             Method (PART) { ID0++ CNT++ HUND () HUND () HUND () HUND () HUND () }
             Method (_SUN)
             {
                 PART () PART () PART () PART () PART () PART () PART () PART () PART () PART ()
                 PART () PART () PART () PART () PART () PART () PART () PART () PART () PART ()
                 Return (0)
             }",
            Outcome::Various,
        ),
        row(
            "moving",
            "Name (NTH, 0)
             Method (ADDR)
             {
                 NTH++
                 If (NTH == 2) { Return (Package () { 0x04000000, 0 }) }
                 If (NTH == 3) { Return (Package () { <page>, 0 }) }
                 Return (Package () { <id>, 0 })
             }
             Method (CTRA)
             {
                 If (NTH == 3) { Return (Package () { <base>, 0 }) }
                 Return (Package () { <page>, 0 })
             }",
            Outcome::Various,
        ),
    ];

    for (name, asl, wrong) in WRONG {
        let addr = asl
            .replace('@', "ADDR")
            .replace("<at", "<id")
            .replace("<before>", "0x0A2007F8")
            .replace("<after>", "0x0A2017F8")
            .replace("<top>", "0xFFFFFFF0");
        let ctra = asl
            .replace('@', "CTRA")
            .replace("<at", "<page")
            .replace("<before>", "0x0A200000")
            .replace("<after>", "0x0A201000")
            .replace("<top>", "0xFFFFF000");
        rows.push(row(
            format!("addr_{name}"),
            format!("{addr} <CTRA>"),
            refused(wrong),
        ));
        rows.push(row(
            format!("ctra_{name}"),
            format!("<ADDR> {ctra}"),
            reseeds(wrong),
        ));
    }
    for (name, asl, wrong) in WRONG_ADDR {
        rows.push(row(*name, format!("{asl} <CTRA>"), refused(wrong)));
    }
    for (name, asl, wrong) in WRONG_CTRA {
        rows.push(row(*name, format!("<ADDR> {asl}"), reseeds(wrong)));
    }
    for (name, asl) in SOUND {
        rows.push(row(format!("sound_{name}"), *asl, Outcome::Node));
    }
    rows
}

/// A `CTRA` at another address, to which the method first writes a counter.
fn elsewhere(address: &str, halves: &str) -> String {
    format!(
        "OperationRegion (FARR, SystemMemory, {address}, 4)
         Field (FARR, DWordAcc, NoLock, Preserve) {{ FCNT, 32 }}
         Method (CTRA) {{ FCNT = <counter> Return (Package () {{ {halves} }}) }}"
    )
}

/// The rows of a Q35.
pub fn q35() -> Vec<Row> {
    vec![row("sound_on_a_q35", "<ADDR> <CTRA>", Outcome::Node)]
}

/// An address in the RAM of virt.
pub const VIRT_RAM: u64 = 0x4800_0000;

/// The rows of arm64's virt, whose firmware reserves no memory: the page is in the device's own
/// (`_CRS`).
pub fn virt() -> Vec<Row> {
    let own = |start: &str, last: &str, len: &str| {
        format!(
            "Name (_CRS, ResourceTemplate ()
             {{
                 QWordMemory (ResourceConsumer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite,
                     0, {start}, {last}, 0, {len})
             }})"
        )
    };
    let page = own("<page>", "<page+0xfff>", "0x1000");
    let ram = format!("{VIRT_RAM:#x}");
    vec![
        row("virt_sound", format!("<ADDR> <CTRA> {page}"), Outcome::Node),
        row("virt_no_counter", "<ADDR>", Outcome::Reseeds(None)),
        row("virt_nothing", "", Outcome::Missing),
        row(
            "virt_ctra_is_in_no_memory_of_the_device",
            "<ADDR> <CTRA>",
            reseeds(NOT_RESERVED),
        ),
        row(
            "virt_ctra_is_behind_the_devices_memory",
            format!("<ADDR> <CTRA> {}", own("<base>", "<base+0xfff>", "0x1000")),
            reseeds(NOT_RESERVED),
        ),
        row(
            "virt_ctra_leaves_the_devices_memory",
            format!("<ADDR> <CTRA> {}", own("<page>", "<page+0x7ff>", "0x800")),
            reseeds("is shorter than a page"),
        ),
        row(
            "virt_ctra_is_unaligned",
            format!(
                "<ADDR> Name (CTRA, Package () {{ <base+8>, 0 }}) {}",
                own("<base>", "<base+0x1fff>", "0x2000")
            ),
            reseeds(NOT_A_PAGE),
        ),
        row(
            "virt_ctra_is_ram",
            format!("<ADDR> Name (CTRA, Package () {{ {ram}, 0 }})"),
            reseeds(RAM),
        ),
        row(
            "virt_ctra_is_beyond_the_width",
            "<ADDR> Name (CTRA, Package () { 0, 0x100000 })",
            reseeds(BEYOND),
        ),
        row(
            "virt_ctra_is_the_flash",
            "<ADDR> Name (CTRA, Package () { 0x04000000, 0 })",
            reseeds(NOT_RESERVED),
        ),
        row(
            "virt_ctra_holds_the_id",
            format!("Name (ADDR, Package () {{ <page+0x100>, 0 }}) <CTRA> {page}"),
            reseeds(SECRET),
        ),
        row(
            "virt_ctra_is_a_string",
            r#"<ADDR> Name (CTRA, "<page>")"#,
            reseeds(NOT_A_PACKAGE),
        ),
        row(
            "virt_addr_is_ram",
            format!("Name (ADDR, Package () {{ {ram}, 0 }}) <CTRA> {page}"),
            refused(RAM),
        ),
        row(
            "virt_addr_is_unaligned",
            format!("Name (ADDR, Package () {{ <id+4>, 0 }}) <CTRA> {page}"),
            refused(UNALIGNED),
        ),
    ]
}

pub fn refused(wrong: &str) -> Outcome {
    Outcome::Refused(format!("ADDR {wrong}: no generation ID"))
}

pub fn reseeds(wrong: &str) -> Outcome {
    Outcome::Reseeds(Some(format!(
        "CTRA {wrong}: no generation counter, reseeding only"
    )))
}

pub fn row(name: impl Into<String>, asl: impl Into<String>, outcome: Outcome) -> Row {
    Row {
        name: name.into(),
        names: NAMES,
        asl: asl.into().replace("<ADDR>", ADDR).replace("<CTRA>", CTRA),
        outside: "",
        patch: None,
        outcome,
        beside: None,
        counter: None,
    }
}
