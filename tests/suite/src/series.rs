// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernel `series`, whose generator compares the ID itself (patches/linux), with an ID, a device, a
//! driver or a process that does not behave.

use crate::{
    context::{
        Context, addresses, expect_reseeds, genctr, lines, no_splat, reseeds, settled_reseeds, wait,
    },
    firmware,
    pairs::{self, Guest, Reseeds, none_alike},
    tests,
    vmforks::{self, Background, notify, poke},
};
use anyhow::{Context as _, Result, ensure};
use harness::{Options, Vm};

tests! {
    [Series];
    an_id_that_never_stops_changing_lets_each_draw_end
    an_id_that_is_half_written_is_a_new_id
    the_driver_is_unbound_and_bound_while_others_draw
    an_unbind_does_not_end_the_comparison
    a_second_device_leaves_the_first_as_it_is
    malformed_devices_leave_a_sound_id_as_it_is
    without_the_device_draws_work
    without_randomized_addresses_no_draw_is_equal
    a_32_bit_process_draws_and_reads_the_time
}

const DRIVER: &str = "/sys/bus/platform/drivers/vmgenid";

fn options(cpus: u16) -> Options {
    Options {
        smp: Some(cpus),
        ..genctr(42)
    }
}

/// Expect that each draw ends, after few reseeds, while another CPU changes the ID all the time. A draw
/// has the generator reseeded once before its key is used, and once for the block that it returns.
/// The draws of other processes also cause reseeds.
fn an_id_that_never_stops_changing_lets_each_draw_end(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, options(2))?;
    let [id, _] = addresses(&vm)?;
    let churn = "/sys/kernel/debug/vmforks/churn";
    let script = format!("exec taskset 2 sh -c 'echo {id} 10000 >{churn}'");
    let churning = Background::start(&vm, &script)?;
    let churned = || -> Result<u64> { Ok(vm.shell(&format!("cat {churn}"))?.trim().parse()?) };
    wait("the ID changes", || Ok((churned()? > 0).then_some(())))?;
    let said = vm.shell("taskset 1 contract reseeds --draws 20000")?;
    let changes = churned()?;
    wait("the ID still changes", || {
        Ok((churned()? > changes).then_some(()))
    })?;
    churning.end(&vm)?;
    let (reseeds, most) = said.trim().split_once(' ').context("no numbers")?;
    ensure!(
        reseeds.parse::<u32>()? >= 10 && most.parse::<u32>()? <= 5,
        "{reseeds} reseeds, in one draw {most}"
    );
    no_splat(&vm)
}

/// Expect that an ID of which one word after the other is written is a new ID each time: the generator
/// is reseeded, though no notification comes.
fn an_id_that_is_half_written_is_a_new_id(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, options(1))?;
    let [id, _] = addresses(&vm)?;
    (0..4).try_for_each(|word| looks_at(&vm, id + 4 * word))?;
    no_splat(&vm)
}

/// Expect that the driver can be unbound and bound 100 times while each CPU draws, also where a
/// notification comes meanwhile, and that afterwards two clones draw nothing alike.
fn the_driver_is_unbound_and_bound_while_others_draw(context: &Context) -> Result<()> {
    let vm = pairs::boot(context, Reseeds::Series, 2, &[])?;
    let device = lines(&vm, &format!("cd {DRIVER} && echo *:*"))?.concat();
    let mut guest = Guest::start(context, vm)?;
    guest.resume()?;
    for _ in 0..10 {
        guest.vm.shell(&format!(
            "cd {DRIVER} && for n in $(seq 10); do echo {device} >unbind && echo {device} >bind || exit 1; done; \
             echo {device} >unbind"
        ))?;
        notify(&guest.vm, 10)?;
        guest.vm.shell(&format!("echo {device} >{DRIVER}/bind"))?;
        notify(&guest.vm, 10)?;
    }
    no_splat(&guest.vm)?;
    none_alike(&mut guest, 5)
}

/// Expect that the generator compares the ID also after the driver was unbound.
fn an_unbind_does_not_end_the_comparison(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, options(1))?;
    let [id, _] = addresses(&vm)?;
    vm.shell(&format!("cd {DRIVER} && echo *:* >unbind"))?;
    looks_at(&vm, id)?;
    no_splat(&vm)
}

/// Expect that the generator compares the ID of the first device, also when another one is bound, and
/// when that one is unbound again. Two lines say what the other one has not.
fn a_second_device_leaves_the_first_as_it_is(context: &Context) -> Result<()> {
    let (_tables, other) = firmware::with(context, &["<ADDR> <CTRA>"])?;
    let vm = vmforks::boot(
        context,
        Options {
            memory: other.memory,
            append: other.append,
            qemu_arg: other.qemu_arg,
            ..options(1)
        },
    )?;
    let said = about(&vm)?;
    ensure!(
        matches!(&said[..], [one, two] if one.ends_with("another ID is looked at: this one reseeds when it is notified")
            && two.ends_with("another device has /dev/vmgenid: reseeding only")),
        "the kernel says: {said:?}"
    );
    let device = said[0].split(' ').nth(1).context("no device")?;
    let device = device.trim_end_matches(':');
    let [id, _] = addresses(&vm)?;
    looks_at(&vm, id)?;
    vm.shell(&format!("echo {device} >{DRIVER}/unbind"))?;
    looks_at(&vm, id)?;
    no_splat(&vm)
}

/// Expect one line for each device with a malformed object, and that the generator compares the ID of
/// the one device whose ID is sound.
fn malformed_devices_leave_a_sound_id_as_it_is(context: &Context) -> Result<()> {
    let devices = [
        "Name (ADDR, 0) <CTRA>",
        "Name (ADDR, Package () { 0, 0 }) <CTRA>",
        "Name (ADDR, Package () { <id+4>, 0 }) <CTRA>",
        "Name (ADDR, Package () { 0x01000000, 0 }) <CTRA>",
        "<ADDR> Name (CTRA, Package () { <page+8>, 0 })",
    ];
    let (_tables, options) = firmware::with(context, &devices)?;
    let options = Options {
        no_module: false,
        ..options
    };
    let vm = vmforks::boot(context, options)?;
    let mut said = about(&vm)?;
    // The driver core adds a line of its own.
    said.retain(|line| !line.contains("probe with driver"));
    let expected = [
        "ADDR is not a package: no generation ID",
        "ADDR is zero: no generation ID",
        "ADDR is not 8-byte aligned: no generation ID",
        "ADDR is in System RAM: no generation ID",
        "CTRA is not page aligned: no generation counter, reseeding only",
    ];
    ensure!(
        said.len() == 5
            && said
                .iter()
                .zip(expected)
                .all(|(said, end)| said.ends_with(end)),
        "the kernel says: {said:#?}"
    );
    looks_at(&vm, firmware::id(4).try_into()?)?;
    no_splat(&vm)
}

/// Expect that a guest without the device draws, and that its driver logs nothing.
fn without_the_device_draws_work(context: &Context) -> Result<()> {
    let vm = vmforks::boot(
        context,
        Options {
            no_device: true,
            genctr: None,
            ..options(2)
        },
    )?;
    let said = about(&vm)?;
    ensure!(said.is_empty(), "the kernel says: {said:?}");
    vm.shell("contract reseeds --draws 1000")?;
    ensure!(reseeds(&vm)? == 0, "a reseed for an ID");
    no_splat(&vm)
}

/// Expect no equal draw of a kernel and a process whose addresses are the same in each boot.
fn without_randomized_addresses_no_draw_is_equal(context: &Context) -> Result<()> {
    let vm = pairs::boot(context, Reseeds::Series, 2, &["nokaslr", "norandmaps"])?;
    none_alike(&mut Guest::start(context, vm)?, 5)
}

/// Expect that the vDSO of a 32-bit process, which has no getrandom, tells the time, and that the
/// process's draws have the generator reseeded for a new ID without a notification.
fn a_32_bit_process_draws_and_reads_the_time(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, options(1))?;
    let [id, _] = addresses(&vm)?;
    let before = settled_reseeds(&vm)?;
    let process = Background::start(&vm, "exec header32 --draw")?;
    poke(&vm, id.into(), 0x5eed)?;
    process.await_line(&vm, "32 bits")?;
    expect_reseeds(&vm, before + 1)?;
    no_splat(&vm)
}

/// Expect that the generator is reseeded when the word at this address changes, without a notification.
fn looks_at(vm: &Vm, id: u32) -> Result<()> {
    let before = settled_reseeds(vm)?;
    poke(vm, id.into(), before as u32 + 1)?;
    // To start the next program takes draws.
    expect_reseeds(vm, before + 1)
}

/// What the driver logs.
fn about(vm: &Vm) -> Result<Vec<String>> {
    lines(vm, "dmesg | sed 's/^[^]]*] //' | grep '^vmgenid ' || true")
}
