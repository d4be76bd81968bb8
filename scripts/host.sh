# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034
#
# The architecture of this machine, under the names that tools have for it. With VMGENID_HOST=arm64 (or
# x86_64) it is that one, so that --dry-run of a script shows what it would build there.

case ${VMGENID_HOST:-$(uname -m)} in
x86_64) host=x86_64 triple=x86_64-unknown-linux-gnu loader=ld-linux-x86-64.so.2 debian=amd64 kernel=tiny ;;
aarch64 | arm64) host=arm64 triple=aarch64-unknown-linux-gnu loader=ld-linux-aarch64.so.1 debian=arm64 kernel=arm64 ;;
*) die "VMGENID_HOST=${VMGENID_HOST-}, and this machine is $(uname -m): it has to be x86_64 or arm64" ;;
esac
# What is built for, if VMGENID_ARCH does not say otherwise.
arch=${VMGENID_ARCH:-$host}
