# SPDX-License-Identifier: GPL-2.0
#
# The module, for any kernel, as every out-of-tree module is built. Below that: the
# commands that use virtual machines.

KDIR ?= /lib/modules/$(shell uname -r)/build

# Kbuild takes the rest (LLVM=, CLIPPY=, V=, INSTALL_MOD_PATH=, ...) from the command
# line.
kbuild = $(MAKE) -C $(KDIR) M=$(CURDIR)

modules: kdir-has-rust
	+$(kbuild) modules

modules_install clean rust-analyzer:
	+$(kbuild) $@

# Kbuild's own messages for these errors are long, and misleading.
kdir-has-rust:
	@test -e $(KDIR)/Makefile || { echo >&2 \
	"make: no kernel build folder $(KDIR): install your kernel's headers, or say KDIR=FOLDER"; exit 1; }
	@grep -qs '^CONFIG_RUST=y' $(KDIR)/include/config/auto.conf || { echo >&2 \
	"make: the kernel in $(KDIR) was configured without CONFIG_RUST=y (or not at all): this module is written in Rust"; exit 1; }
	@test -e $(KDIR)/rust/libkernel.rmeta || { echo >&2 \
	"make: $(KDIR) lacks the Rust metadata (rust/*.rmeta): give KDIR= the folder that the kernel was built in"; exit 1; }
	@grep -qs '^CONFIG_VMGENID=' $(KDIR)/include/config/auto.conf || { echo >&2 \
	"make: the kernel in $(KDIR) was configured without CONFIG_VMGENID: nothing reseeds it when the generation ID changes"; exit 1; }

# Everything that a virtual machine needs: a guest kernel, QEMU, the module for that
# kernel, the programs. Complete parts are not built again.
on-arm64 := $(filter aarch64 arm64,$(or $(VMGENID_HOST),$(shell uname -m)))
KERNEL ?= $(or $(VMGENID_KERNEL),$(if $(on-arm64),arm64,tiny))

# What kernels for arm64 need beside the programs of the host.
arm64 := $(filter arm64%,$(KERNEL))

prepare:
	@scripts/buildroot
	+@$(MAKE) --no-print-directory -j2 prepare-qemu prepare-kernel
	@scripts/module $(KERNEL)
	@scripts/userspace
ifneq ($(arm64),)
	@VMGENID_ARCH=arm64 scripts/userspace
endif

# Only the parts that a demo needs. Its kernel is Debian's own, which is not built.
prepare-demo:
	@scripts/buildroot
	+@$(MAKE) --no-print-directory -j2 prepare-qemu prepare-debian-kernel
	@scripts/module --driver $(if $(on-arm64),arm64-)stock
	@scripts/userspace vm guest contract
	@$(if $(on-arm64),VMGENID_ARCH=arm64 scripts/userspace guest contract)

prepare-qemu:
	@$(if $(arm64),VMGENID_ARCH=arm64 )scripts/qemu

prepare-debian-kernel:
	@scripts/debian-kernel

prepare-kernel:
	@scripts/kernel $(KERNEL)

vm:
	@scripts/vm run --kernel $(KERNEL)

# Also without the early look, on a machine like Firecracker's, and with vmgenctr, on a kernel that
# has its own driver built in.
test:
	@VMGENID_KERNEL=$(KERNEL) scripts/test
ifeq ($(KERNEL),tiny)
	@VMGENID_KERNEL=tiny VMGENID_PARAMETERS=early_look=0 scripts/test
	@VMGENID_KERNEL=tiny VMGENID_MACHINE=microvm VMGENID_SOURCE=vmclock scripts/test
	@VMGENID_KERNEL=builtin scripts/test
endif

# The same tests in kernels with checkers; see scripts/test.
test-debug:
	@VMGENID_KERNEL=debug scripts/test
	@VMGENID_KERNEL=kcsan scripts/test
	@VMGENID_KERNEL=debug-builtin scripts/test

# On arm64, in guests with a device tree; with UEFI and ACPI; with vmgenctr; with pages of 64 KiB.
test-arm64:
	@VMGENID_KERNEL=arm64 scripts/test
	@VMGENID_KERNEL=arm64 VMGENID_FIRMWARE=ovmf scripts/test
	@VMGENID_KERNEL=arm64-builtin scripts/test
	@VMGENID_KERNEL=arm64-64k scripts/test

# kbuild's own clean needs the kernel's build folder, which a machine may lack.
distclean:
	+@test ! -e $(KDIR)/Makefile || $(MAKE) --no-print-directory clean
	rm -rf out

# The other commands, each a script.
demo check docs soak stepper pairs bench deb test-debian mutants prune:
	@scripts/$@

help:
	@echo  'The module, for the kernel that was built in KDIR:'
	@echo  '  modules         - build vmgenid.ko (the default), or, for a kernel that has its own'
	@echo  '                    driver built in, vmgenctr.ko'
	@echo  '  modules_install - install it below INSTALL_MOD_PATH'
	@echo  '  clean           - remove what was built in this folder'
	@echo  '  rust-analyzer   - write rust-project.json for editors'
	@echo  '  KDIR=FOLDER     - a kernel build folder [$(KDIR)]'
	@echo  '  LLVM=1, CLIPPY=1, V=1 and the like: as for the kernel itself'
	@echo  ''
	@echo  'In a virtual machine; these build all that they need:'
	@echo  '  demo            - restore a snapshot, see the counter change'
	@echo  '  test            - all tests'
	@echo  '  test-debug      - all tests under KASAN, lockdep, kmemleak, KCSAN, ...'
	@echo  '  test-arm64      - the promises and the tests with clones on arm64, with a device tree and ACPI'
	@echo  '  soak            - a thousand restores (RESTORES=N), then an hour of unbinding and'
	@echo  '                    unloading under load (SOAK=MINUTES)'
	@echo  '  stepper         - snapshots at every instruction of a reseed, two clones of each; writes'
	@echo  '                    out/stepper.md (hours)'
	@echo  '  pairs           - snapshots at random moments of Linux, Linux with this module and Linux with'
	@echo  '                    patches/linux, two clones of each (N=1000); writes Documentation/bench'
	@echo  '  mutants         - break one line of the driver or of the QEMU series after the other: a'
	@echo  '                    test has to notice each'
	@echo  '  bench           - measure the driver beside its peers; writes Documentation/bench'
	@echo  '  deb             - the packages vmgenid-dkms, vmgenid and libvmgenid-dev, in out/deb'
	@echo  '  test-debian     - install them in Debian guests, with Debian'"'"'s own kernel'
	@echo  '  docs            - the site, in out/docs, and a look at each page in a browser'
	@echo  '  check           - formatting, lints, checkpatch, words, licences'
	@echo  '  vm              - a shell in a guest that has /dev/vmgenid'
	@echo  '  prepare         - only build'
	@echo  '  prune           - remove from the cache what no checkout has used for 14 days'
	@echo  '  distclean       - clean, and remove out/'
	@echo  '  KERNEL=NAME     - of vm, prepare, test: tests/kernel/NAME.config [$(KERNEL)]'

.PHONY: modules modules_install clean rust-analyzer kdir-has-rust prepare prepare-demo prepare-qemu prepare-kernel prepare-debian-kernel vm demo docs test test-debug test-arm64 test-debian deb soak stepper pairs mutants bench check prune distclean help
