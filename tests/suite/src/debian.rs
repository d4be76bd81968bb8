// SPDX-License-Identifier: MIT OR Apache-2.0

//! The packages, in whole Debian guests, with Debian's own kernel.

use crate::{
    clones,
    context::{Context, expect_reseeds, lines, reseeds, wait},
    tests,
};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Flavour, Options, Source, Vm, kernel};
use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

tests! {
    [Debian];
    a_build_that_fails_is_mended_and_the_module_is_loaded (30 min)
    a_user_reads_maps_and_polls (30 min)
    vmclock_is_for_every_user_if_wanted (30 min)
    a_reboot_brings_the_device_back (30 min)
    the_identity_is_renewed_once_in_each_clone (30 min)
    a_service_that_is_stopped_or_fails_loses_no_restore (30 min)
    no_look_is_stale_and_no_draw_is_twice (30 min)
    draws_after_the_barrier_differ_in_every_clone (30 min)
    upgrade_removal_and_reinstall_leave_nothing (30 min)
    dkms_works_by_hand (30 min)
    under_stock_qemu_reseeds_are_counted (30 min)
    what_is_wrong_is_said (30 min)
    enforced_signatures_are_named (30 min)
    an_unknown_parameter_is_named (30 min)
}

const APT: &str = "DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0";

/// Where the packages are in the guests.
const PACKAGES: &str = "/root/packages";

/// Where DKMS's hook looks for metadata, and where the disk has it.
const METADATA: &str = "/var/cache/vmgenid-dkms";
const MADE: &str = "/usr/local/share/vmgenid-metadata";

/// Lists the guest's files, except those in folders that apt and the kernel write to in any case.
const FILES: &str = "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /tmp \
    -o -path /root -o -path /var/tmp -o -path /var/log -o -path /var/lib/dpkg \
    -o -path /var/lib/systemd -o -path /var/cache/apt -o -path /var/lib/apt \
    -o -path /var/cache/ldconfig -o -path /var/cache/debconf \\) -prune -o -print | sort";

/// Lists the files of the kernel's packages that differ from what the packages contain.
const VERIFY: &str =
    "dpkg --verify $(dpkg-query -W -f '${Package} ' 'linux-headers-*' 'linux-kbuild-*') | sort";

fn debian() -> Options {
    Options {
        kernel: Some(kernel::DEBIAN.into()),
        genctr: Some(42),
        // As in the matrix: QEMU can end while the guest uses the HPET and sets up PCI devices.
        append: vec!["hpet=disable".into()],
        ..Options::default()
    }
}

/// The options of a guest in which apt has installed the module.
fn with_module(context: &Context) -> Result<Options> {
    Ok(Options {
        disk: Some(installed(context)?),
        ..debian()
    })
}

/// The path of a package on the host.
fn package(context: &Context, folder: &str, name: &str) -> Result<PathBuf> {
    let folder = context.top.join("out").join(folder);
    let is_it = |path: &PathBuf| {
        let file = path.file_name().and_then(|file| file.to_str());
        file.is_some_and(|file| file.starts_with(&format!("{name}_")) && file.ends_with(".deb"))
    };
    fs::read_dir(&folder)
        .with_context(|| format!("{}: use scripts/test-debian", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(is_it)
        .with_context(|| format!("no package {name} in {}", folder.display()))
}

/// Boots a guest that has the packages, as files, and the next version's.
fn boot(context: &Context, mut options: Options) -> Result<Vm> {
    for (folder, name) in [
        ("deb", "vmgenid-dkms"),
        ("deb", "vmgenid"),
        ("deb-next", "vmgenid-dkms"),
    ] {
        options.add.push(Add {
            host: package(context, folder, name)?,
            guest: format!("{PACKAGES}/{folder}/{name}.deb"),
        });
    }
    options.add.push(Add {
        host: context.program("contract"),
        guest: "/root/contract".into(),
    });
    let vm = Vm::boot(&context.host, options)?;
    vm.shell("install -m 755 /root/contract /tmp/contract")?;
    Ok(vm)
}

/// Whether a script succeeds, and its output and error output.
fn said(vm: &Vm, script: &str) -> Result<(bool, String)> {
    let output = vm.exec(["sh", "-c", &format!("exec 2>&1; {script}")])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((output.status.success(), said))
}

/// Checks that exactly one line has `words`.
fn one_line(said: &str, words: &str) -> Result<()> {
    let count = said.lines().filter(|line| line.contains(words)).count();
    ensure!(count == 1, "{count} lines with {words:?}, not one: {said}");
    Ok(())
}

fn succeeds(vm: &Vm, script: &str) -> Result<String> {
    let (success, said) = said(vm, script)?;
    ensure!(success, "{script}: {said}");
    Ok(said)
}

fn await_node(vm: &Vm, node: &str) -> Result<()> {
    wait(node, || {
        Ok(said(vm, &format!("test -c {node}"))?.0.then_some(()))
    })
}

/// A command of an unprivileged user.
fn as_nobody(vm: &Vm, script: &str) -> Result<String> {
    let output = vm.exec(["runuser", "-u", "nobody", "--", "sh", "-c", script])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {stderr}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().into())
}

/// The disk of a guest in which apt has installed the packages. The first test that needs the disk
/// makes it. apt installs the packages without the metadata, which fails, and then with it.
fn installed(context: &Context) -> Result<PathBuf> {
    static DISK: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut disk = DISK.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(disk) = &*disk {
        return Ok(disk.clone());
    }
    let vm = boot(context, debian())?;
    vm.shell(&format!("{FILES} >/root/files; {VERIFY} >/root/verified"))?;

    let install = format!("{APT} install {PACKAGES}/deb/*.deb");
    let (success, all) = said(&vm, &install)?;
    ensure!(!success, "there is no metadata: {all}");
    one_line(&all, "install the package linux-source-7.3 (version 7.3")?;
    let state = "dpkg-query -W -f '${db:Status-Status}' vmgenid-dkms";
    let status = vm.shell(state)?;
    ensure!(status == "half-configured", "vmgenid-dkms is {status}");

    vm.shell(&format!("mkdir -p {METADATA} && cp -a {MADE}/. {METADATA}"))?;
    succeeds(&vm, &format!("{APT} install -f"))?;
    let status = vm.shell(state)?;
    ensure!(status == "installed", "vmgenid-dkms is {status}");
    // The installation has not changed the kernel's packages.
    succeeds(&vm, &format!("{VERIFY} | diff /root/verified -"))?;
    let modules = vm.shell("cat /proc/modules")?;
    ensure!(modules.contains("vmgenctr "), "not loaded: {modules}");
    let signer = vm.shell("modinfo -F signer vmgenctr")?;
    ensure!(!signer.trim().is_empty(), "the module is not signed");
    await_node(&vm, "/dev/vmgenid")?;

    vm.shell("sync")?;
    let copy = context.top.join("out/debian/installed.qcow2");
    fs::create_dir_all(context.top.join("out/debian"))?;
    vm.copy_disk(&copy)?;
    *disk = Some(copy.clone());
    Ok(copy)
}

/// Expect that the installation fails with one line that says what to install where the metadata is
/// missing, that it succeeds with the metadata, that the module is signed and loaded, and that the
/// kernel's packages are unchanged.
fn a_build_that_fails_is_mended_and_the_module_is_loaded(context: &Context) -> Result<()> {
    installed(context).map(drop)
}

/// Expect that `/dev/vmgenid` returns VMClock's counter on Debian's own kernel. Expect that only root
/// can read `/dev/vmclock0`, the node of Debian's own driver, until an operator changes its mode.
fn vmclock_is_for_every_user_if_wanted(context: &Context) -> Result<()> {
    let mut vm = boot(
        context,
        Options {
            source: Source::Vmclock,
            ..with_module(context)?
        },
    )?;
    await_node(&vm, "/dev/vmgenid")?;
    await_node(&vm, "/dev/vmclock0")?;
    let counter = as_nobody(&vm, "/tmp/contract counter")?;
    ensure!(counter == "read 42, mapped 42", "as nobody: {counter}");
    let mode = |vm: &Vm| -> Result<String> {
        Ok(vm.shell("stat -c '%a %U %G' /dev/vmclock0")?.trim().into())
    };
    ensure!(mode(&vm)? == "600 root root", "it is {}", mode(&vm)?);
    vm.shell(
        "sed 's/^#SUBSYSTEM/SUBSYSTEM/' /usr/lib/udev/rules.d/60-vmgenid-dkms.rules \
             >/etc/udev/rules.d/60-vmgenid-dkms.rules && \
         udevadm control --reload && udevadm trigger --settle /dev/vmclock0",
    )?;
    ensure!(mode(&vm)? == "444 root root", "it is {}", mode(&vm)?);
    vm.set_genctr(43)?;
    let get = as_nobody(&vm, "vmgenid get --source vmclock")?;
    ensure!(get == "43", "vmgenid get --source vmclock: {get}");
    Ok(())
}

/// Expect that an ordinary user reads, maps and polls `/dev/vmgenid`, that systemd knows the node,
/// and that a change is seen and reseeds once.
fn a_user_reads_maps_and_polls(context: &Context) -> Result<()> {
    let mut vm = boot(context, with_module(context)?)?;
    await_node(&vm, "/dev/vmgenid")?;
    let mode = vm.shell("stat -c '%a %U %G' /dev/vmgenid")?;
    ensure!(mode.trim() == "444 root root", "the node is {mode}");
    let counter = as_nobody(&vm, "/tmp/contract counter")?;
    ensure!(counter == "read 42, mapped 42", "as nobody: {counter}");
    let get = as_nobody(&vm, "vmgenid get")?;
    ensure!(get == "42", "vmgenid get: {get}");
    // Units can wait for the node. systemd knows it when udev has handled it.
    wait("dev-vmgenid.device", || {
        Ok(said(&vm, "systemctl is-active dev-vmgenid.device")?
            .0
            .then_some(()))
    })?;

    let watch = ["runuser", "-u", "nobody", "--", "vmgenid", "watch"];
    vm.spawn(watch, "/tmp/watch")?;
    wait("the watcher", || {
        Ok(vm.shell("cat /tmp/watch")?.contains("42").then_some(()))
    })?;
    vm.set_genctr(43)?;
    wait("the change", || {
        Ok(vm.shell("cat /tmp/watch")?.contains("43").then_some(()))
    })?;
    let counter = as_nobody(&vm, "/tmp/contract counter")?;
    ensure!(counter == "read 43, mapped 43", "as nobody: {counter}");
    expect_reseeds(&vm, 1)?;
    Ok(())
}

/// Expect that after a reboot the node, the counter and the watcher are there, and that no unit has
/// failed.
fn a_reboot_brings_the_device_back(context: &Context) -> Result<()> {
    let mut vm = boot(context, with_module(context)?)?;
    let boots = "cat /proc/sys/kernel/random/boot_id";
    let before = vm.shell(boots)?;
    vm.reboot("systemctl reboot")?;
    ensure!(vm.shell(boots)? != before, "it has not booted again");
    await_node(&vm, "/dev/vmgenid")?;
    let counter = as_nobody(&vm, "vmgenid get")?;
    ensure!(counter == "42", "after the reboot: {counter}");
    await_watcher(&vm)?;
    no_unit_failed(&vm)
}

fn no_unit_failed(vm: &Vm) -> Result<()> {
    let failed = vm.shell("systemctl --failed --no-legend")?;
    ensure!(failed.is_empty(), "units failed: {failed}");
    Ok(())
}

/// Waits until a script succeeds. `log` is a script whose output explains a failure.
fn until(vm: &Vm, script: &str, log: &str) -> Result<()> {
    let until = format!("timeout 600 sh -c 'until {script}; do sleep 1; done' >/dev/null 2>&1");
    let (done, _) = said(vm, &until)?;
    ensure!(done, "{script}: {}", said(vm, log)?.1);
    Ok(())
}

const UNITS: &str = "vmgenid status; journalctl --no-pager --merge -b -u 'vmgenid*'";

/// udev starts the watcher, and the watcher tells systemd when it watches.
fn await_watcher(vm: &Vm) -> Result<()> {
    let active =
        "systemctl is-active vmgenid-watch.service && systemctl is-active vmgenid-renew.path";
    until(vm, active, UNITS)
}

/// Waits until all hooks have run in this generation.
fn await_renewed(vm: &Vm, generation: u32) -> Result<()> {
    let renewed = format!("vmgenid status | grep -qx \"renewed: yes, generation {generation}\"");
    until(vm, &renewed, UNITS)
}

/// Adds hooks: the examples, one that writes down that it ran, and a unit that does the same.
const ADD_HOOKS: &str = r#"
    cd /etc/vmgenid/restored.d
    ln -s /usr/share/vmgenid/hooks/* .
    printf '#!/bin/sh\necho hook $VMGENID_FROM $VMGENID_TO >>/root/ran\n' >50-write
    chmod +x 50-write
    cp 50-write 50-write~
    printf '%s\n' '[Service]' Type=oneshot "ExecStart=/bin/sh -c 'echo unit >>/root/ran'" \
        '[Install]' WantedBy=vmgenid-restored.target >/etc/systemd/system/after-restore.service
    systemctl -q daemon-reload && systemctl -q enable after-restore.service"#;

/// What an administrator sees of a machine's identity.
const IDENTITY: &str = "cat /etc/machine-id /etc/ssh/ssh_host_*_key.pub";

/// Expect that each clone has a machine ID and SSH host keys of its own after the restore, that
/// each hook and each unit of vmgenid-restored.target runs once, and that the watcher's unit is
/// restricted and does not run as root.
fn the_identity_is_renewed_once_in_each_clone(context: &Context) -> Result<()> {
    let mut vm = boot(context, with_module(context)?)?;
    await_watcher(&vm)?;
    await_renewed(&vm, 42)?;
    succeeds(&vm, ADD_HOOKS)?;
    let exposure = "systemd-analyze security --no-pager --threshold=20 vmgenid-watch.service";
    let security = succeeds(&vm, exposure)?;
    eprintln!("{}", security.lines().last().unwrap_or_default());
    let user = vm.shell("ps -o user= -C vmgenid")?;
    ensure!(
        user.trim() != "root" && user.lines().count() == 1,
        "it runs as {user}"
    );
    let mut seen: BTreeSet<String> = lines(&vm, IDENTITY)?.into_iter().collect();
    let count = seen.len();
    ensure!(count >= 4, "machine ID and host keys: {seen:?}");

    let renewed = |vm: &Vm, generation: u32, seen: &mut BTreeSet<String>, ran: &[String]| {
        await_renewed(vm, generation)?;
        let before = seen.len();
        seen.extend(lines(vm, IDENTITY)?);
        ensure!(
            seen.len() == before + count,
            "in clone {generation} there are {seen:?}"
        );
        // The server that runs uses the new key.
        let new = vm.shell("cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub")?;
        let served = vm.shell("ssh-keyscan -t ed25519 127.0.0.1 2>/dev/null")?;
        ensure!(served.contains(new.trim()), "served: {served}, new: {new}");
        // No further hook runs.
        vm.shell("sleep 2")?;
        let got = lines(vm, "cat /root/ran")?;
        ensure!(got == ran, "in clone {generation} ran {got:?}, not {ran:?}");
        no_unit_failed(vm)
    };
    vm.snapshot(&"first".parse()?)?;
    for value in [50, 51] {
        let mut clone = vm.clone_from(&"first".parse()?, Some(value), None)?;
        let mut ran = vec![format!("hook 42 {value}"), "unit".into()];
        renewed(&clone, value, &mut seen, &ran)?;
        if value == 50 {
            // A restart of the watcher is no restore. Then the clone is cloned.
            clone.shell("systemctl restart vmgenid-watch.service")?;
            clone.snapshot(&"second".parse()?)?;
            let second = clone.clone_from(&"second".parse()?, Some(60), None)?;
            ran.extend(["hook 50 60".into(), "unit".into()]);
            renewed(&second, 60, &mut seen, &ran)?;
        }
    }
    let still = said(&vm, "cat /root/ran")?.1;
    ensure!(
        still.contains("No such file"),
        "without a restore ran {still}"
    );
    Ok(())
}

/// Expect that a restore is found also where the watcher is stopped or killed, or a hook fails.
/// Expect that `vmgenid status` names a hook that fails.
fn a_service_that_is_stopped_or_fails_loses_no_restore(context: &Context) -> Result<()> {
    let mut vm = boot(context, with_module(context)?)?;
    await_watcher(&vm)?;
    await_renewed(&vm, 42)?;
    succeeds(&vm, ADD_HOOKS)?;
    vm.shell("rm /etc/vmgenid/restored.d/[1-4]*")?;

    vm.shell("systemctl stop vmgenid-watch.service")?;
    vm.set_genctr(43)?;
    vm.shell("sleep 1; systemctl start vmgenid-watch.service")?;
    await_renewed(&vm, 43)?;
    vm.shell("systemctl kill -s STOP vmgenid-watch.service")?;
    vm.set_genctr(44)?;
    vm.shell("systemctl kill -s KILL vmgenid-watch.service")?;
    await_renewed(&vm, 44)?;

    vm.shell(
        r"cd /etc/vmgenid/restored.d
        printf '#!/bin/sh\ntest -e /root/ok\n' >60-fails
        chmod +x 60-fails
        mkdir -p /run/systemd/system/vmgenid-renew.service.d
        printf '%s\n' '[Service]' ExecStart= \
            'ExecStart=/usr/bin/vmgenid renew --tries 2 /etc/vmgenid/restored.d' \
            >/run/systemd/system/vmgenid-renew.service.d/tries.conf
        systemctl daemon-reload",
    )?;
    vm.set_genctr(45)?;
    until(&vm, "systemctl is-failed vmgenid-renew.service", UNITS)?;
    let status = said(&vm, "vmgenid status")?.1;
    one_line(&status, "60-fails: exit status: 1")?;
    one_line(&status, "renewed: no, generation 45")?;
    // The next boot tries again, although the counter is the same.
    vm.reboot("touch /root/ok; systemctl reboot")?;
    await_watcher(&vm)?;
    await_renewed(&vm, 45)?;
    let ran = lines(&vm, "grep hook /root/ran")?;
    let expected = ["hook 42 43", "hook 43 44", "hook 44 45"];
    ensure!(ran == expected, "ran {ran:?}");
    no_unit_failed(&vm)
}

/// Expect of clones of the Debian guest what is expected of the small guests: no stale look, and no
/// draw twice.
fn no_look_is_stale_and_no_draw_is_twice(context: &Context) -> Result<()> {
    clones::look_and_draw(context, with_module(context)?)
}

/// Expect that no draw after the barrier is the same in two clones of the Debian guest.
fn draws_after_the_barrier_differ_in_every_clone(context: &Context) -> Result<()> {
    clones::draws_differ(&mut context.boot(with_module(context)?)?, false)
}

/// Expect that an upgrade replaces the module's source and keeps the node, that a removal leaves no
/// module, no node and no source, that a restore meanwhile is found after a reinstall, and that a
/// purge leaves the guest's files as they were.
fn upgrade_removal_and_reinstall_leave_nothing(context: &Context) -> Result<()> {
    let mut vm = boot(context, with_module(context)?)?;
    await_node(&vm, "/dev/vmgenid")?;
    await_watcher(&vm)?;

    let all = succeeds(&vm, &format!("{APT} install {PACKAGES}/deb-next/*.deb"))?;
    ensure!(!all.contains("is in use"), "the module is pinned: {all}");
    let versions = lines(&vm, "dkms status; ls -d /usr/src/vmgenid-*")?;
    ensure!(
        versions.len() == 2 && versions.iter().all(|line| line.contains("99.0")),
        "after the upgrade: {versions:?}"
    );
    await_node(&vm, "/dev/vmgenid")?;
    await_watcher(&vm)?;

    succeeds(&vm, &format!("{APT} remove vmgenid-dkms"))?;
    let there = "cat /proc/modules | grep vmgen; ls -d /dev/vmgenid /usr/src/vmgenid-* \
        /lib/modules/*/updates/dkms/vmgen* 2>/dev/null || true";
    let left = vm.shell(there)?;
    ensure!(left.is_empty(), "after the removal: {left}");

    // A restore while there is no module.
    vm.set_genctr(43)?;
    succeeds(&vm, &format!("{APT} install {PACKAGES}/deb/*.deb"))?;
    await_node(&vm, "/dev/vmgenid")?;
    await_watcher(&vm)?;
    await_renewed(&vm, 43)?;

    succeeds(&vm, &format!("{APT} purge vmgenid-dkms vmgenid"))?;
    let before: BTreeSet<_> = lines(&vm, "cat /root/files")?.into_iter().collect();
    let after: BTreeSet<_> = lines(&vm, FILES)?.into_iter().collect();
    // DKMS keeps the key that it signs with.
    let own = |file: &&String| !file.starts_with("/var/lib/dkms/mok.");
    let more: Vec<_> = after.difference(&before).filter(own).collect();
    let less: Vec<_> = before.difference(&after).collect();
    ensure!(
        more.is_empty() && less.is_empty(),
        "after the purge there is more: {more:?}, and less: {less:?}"
    );
    succeeds(&vm, &format!("{VERIFY} | diff /root/verified -")).map(drop)
}

/// Expect that DKMS, called by hand, builds, installs and removes the module of a checkout, as on a
/// distribution that has none of the project's packages.
fn dkms_works_by_hand(context: &Context) -> Result<()> {
    let vm = boot(context, debian())?;
    vm.shell(&format!("mkdir -p {METADATA} && cp -a {MADE}/. {METADATA}"))?;
    // The package has the files of a checkout. The folder has another name.
    vm.shell(&format!(
        "dpkg-deb -x {PACKAGES}/deb/vmgenid-dkms.deb /tmp/x && mv /tmp/x/usr/src/vmgenid-* /tmp/checkout"
    ))?;
    succeeds(&vm, "cd /tmp/checkout && dkms add .")?;
    let version = lines(&vm, "dkms status | cut -d: -f1")?;
    ensure!(version.len() == 1, "dkms status: {version:?}");
    succeeds(&vm, &format!("dkms install {}", version[0]))?;
    succeeds(&vm, "modprobe vmgenctr")?;
    await_node(&vm, "/dev/vmgenid")?;
    succeeds(&vm, "rmmod vmgenctr")?;
    succeeds(&vm, &format!("dkms remove {} --all", version[0]))?;
    let left = vm.shell("find /lib/modules -name 'vmgen*'; dkms status")?;
    ensure!(left.is_empty(), "after the removal: {left}");
    Ok(())
}

/// Expect that under stock QEMU, with sysgenid=1, each of eight clones counts one reseed and wakes
/// a watcher, that the clones draw different bytes, and that the original does not reseed.
fn under_stock_qemu_reseeds_are_counted(context: &Context) -> Result<()> {
    let options = Options {
        qemu: Flavour::Stock,
        genctr: None,
        ..with_module(context)?
    };
    let mut vm = boot(context, options)?;
    wait("the generator is initialized", || {
        let log = vm.shell("dmesg")?;
        Ok(log.contains("crng init done").then_some(()))
    })?;
    let (there, _) = said(&vm, "test -e /dev/vmgenid")?;
    ensure!(!there, "there is /dev/vmgenid without a counter");
    vm.shell("sed -i 's/^#\\(options vmgenctr\\)/\\1/' /etc/modprobe.d/vmgenid.conf")?;
    succeeds(&vm, "modprobe -r vmgenctr; modprobe vmgenctr")?;
    await_node(&vm, "/dev/sysgenid")?;
    one_line(&vm.shell("dmesg")?, "until then clones repeat")?;
    let before: u32 = as_nobody(&vm, "vmgenid get --source sysgenid")?.parse()?;
    let watch = ["runuser", "-u", "nobody", "--", "vmgenid", "watch"];
    vm.spawn(watch, "/tmp/watch")?;
    wait("the watcher", || {
        let watching = vm.shell("cat /tmp/watch")?;
        Ok(watching.contains("watching sysgenid").then_some(()))
    })?;

    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    let mut draws = BTreeSet::new();
    for n in 0..8 {
        let clone = vm.clone_from(&snapshot, None, None)?;
        let after = wait("the count", || {
            let count: u32 = as_nobody(&clone, "vmgenid get --source sysgenid")?.parse()?;
            Ok((count != before).then_some(count))
        })?;
        ensure!(after == before.wrapping_add(1), "clone {n}: {after}");
        expect_reseeds(&clone, 1).with_context(|| format!("clone {n}"))?;
        draws.insert(as_nobody(&clone, "head -c 32 /dev/urandom | od -An -tx1")?);
        wait("the watcher", || {
            let lines = clone.shell("wc -l </tmp/watch")?;
            Ok((lines.trim() != "1").then_some(()))
        })?;
    }
    ensure!(draws.len() == 8, "{} draws of 8 clones", draws.len());
    ensure!(reseeds(&vm)? == 0, "the original also reseeded");
    Ok(())
}

/// Expect that each tool fails with one line that names the cause.
fn what_is_wrong_is_said(context: &Context) -> Result<()> {
    let vm = boot(context, with_module(context)?)?;
    vm.shell(
        "release=$(uname -r); headers=/lib/modules/$release/build
        for kind in compiler rust other; do
            mkdir -p /tmp/$kind/include/generated
            cp $headers/.config $headers/Module.symvers /tmp/$kind
            cp $headers/include/generated/utsrelease.h $headers/include/generated/package.h /tmp/$kind/include/generated
        done
        sed -i 's/^CONFIG_RUSTC_VERSION_TEXT=.*/CONFIG_RUSTC_VERSION_TEXT=\"rustc 1.99.0\"/' /tmp/compiler/.config
        sed -i 's/^CONFIG_RUST=y/# CONFIG_RUST is not set/' /tmp/rust/.config
        echo >>/tmp/other/.config
        cp -r /var/cache/vmgenid-dkms/$release /tmp/damaged
        printf x >>/tmp/damaged/rust/libkernel.rmeta",
    )?;
    let tools = "cd /usr/src/vmgenid-*/packaging; release=$(uname -r); \
        headers=/lib/modules/$release/build;";
    for (script, words) in [
        (
            "./dkms-pre-build 9.9.9 /lib/modules/9.9.9/build",
            "install the package linux-headers-9.9.9",
        ),
        (
            "./dkms-pre-build $release /tmp/rust",
            "was built without CONFIG_RUST=y",
        ),
        (
            "./rust-metadata --check /tmp/compiler /var/cache/vmgenid-dkms/$release",
            "wrong compiler: the kernel",
        ),
        (
            "./rust-metadata --check /tmp/other /var/cache/vmgenid-dkms/$release",
            "was made for another kernel or compiler: it does not say \"config ",
        ),
        (
            "./rust-metadata --check $headers /tmp/damaged",
            "the files in /tmp/damaged are not those that were compiled",
        ),
        (
            "./rust-metadata $headers /usr/src /tmp/out 7.3.3-1",
            "wrong source: the kernel",
        ),
        (
            "./rust-metadata $headers /usr/src/linux-source-7.3.tar.xz /tmp/out",
            "install the package linux-source-7.3 (version 7.3",
        ),
        ("make -s -C .. KDIR=$headers", "lacks the Rust metadata"),
    ] {
        let (success, said) = said(&vm, &format!("{tools} {script}"))?;
        ensure!(!success, "{script} succeeds: {said}");
        one_line(&said, words)?;
        let own = said.lines().filter(|line| !line.contains("***")).count();
        ensure!(own == 1, "{script} says more than one line: {said}");
    }
    Ok(())
}

/// Expect that a kernel that enforces signatures does not load the module, and that one line of the
/// installation names module.sig_enforce=1.
fn enforced_signatures_are_named(context: &Context) -> Result<()> {
    let mut options = with_module(context)?;
    options.append.push("module.sig_enforce=1".into());
    let vm = boot(context, options)?;
    let (there, _) = said(&vm, "test -e /dev/vmgenid")?;
    ensure!(!there, "the module is loaded");
    let install = format!("{APT} install --reinstall {PACKAGES}/deb/vmgenid-dkms.deb");
    let said = succeeds(&vm, &install)?;
    one_line(&said, "module.sig_enforce=1")
}

/// Expect that the module is loaded where it gets an unknown parameter, and that one line names the
/// parameter.
fn an_unknown_parameter_is_named(context: &Context) -> Result<()> {
    let vm = boot(context, with_module(context)?)?;
    await_node(&vm, "/dev/vmgenid")?;
    // udev loads the module, without the parameter, while it handles devices, and has systemd start
    // the watcher, which has the node open. So the unloading waits for udev, and is tried again.
    let unload = "udevadm settle && systemctl stop vmgenid-watch.service && modprobe -r vmgenctr";
    wait("the module is unloaded", || {
        Ok(said(&vm, unload)?.0.then_some(()))
    })?;
    succeeds(&vm, "modprobe vmgenctr nonsense=1")?;
    one_line(
        &vm.shell("dmesg")?,
        "vmgenctr: unknown parameter 'nonsense' ignored",
    )?;
    await_node(&vm, "/dev/vmgenid")
}
