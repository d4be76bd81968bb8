# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Functions for the scripts in this folder: the place of the cache, the log of a step,
# results that appear in one step, and commands inside the build root.
#
# A result is a folder $cache/NAME-KEY, where KEY is a hash of everything that it was made
# from. It is made in NAME-KEY.tmp and renamed when it is complete. Incomplete folders are
# removed. So a folder with its final name is complete, also after an interrupted build.

set -euo pipefail

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=${VMGENID_CACHE:-${XDG_CACHE_HOME:-${HOME-}/.cache}/vmgenid}

die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

say() {
	printf '%s\n' "$*" >&2
}

case $(uname -m) in
x86_64 | aarch64) ;;
*) die "this machine is $(uname -m): guests, QEMU and programs are built on x86_64 and aarch64 machines only" ;;
esac

mkdir -p "$cache" 2>/dev/null ||
	die "cannot create the cache $cache: set XDG_CACHE_HOME to a folder that can be written"
cache=$(cd "$cache" && pwd -P)
case $top$cache in
*[[:space:]]*) die "kbuild takes no path with a space in it: move the checkout ($top), or set XDG_CACHE_HOME ($cache)" ;;
esac

# Links to the folders of the cache that this checkout uses. Another checkout may use other folders.
links=$top/out/links
mkdir -p "$links" 2>/dev/null || die "cannot create $links: the checkout has to be writable"

# use NAME FOLDER: this checkout uses FOLDER of the cache as NAME. The folder's time becomes that of
# its last use, for scripts/prune.
use() {
	touch -c "$2"
	ln -sfn "$2" "$links/$1"
}

# hash STRING...: a key of 12 hexadecimal digits.
hash() {
	printf '%s\0' "$@" | sha256sum | cut -c1-12
}

# space GIB WHAT: ends the script if the cache's file system has less free space than that.
space() {
	local free
	free=$(df --output=avail -k "$cache" | tail -n 1)
	[ "$free" -ge $(($1 * 1024 * 1024)) ] ||
		die "$2 needs $1 GiB in $cache, $((free / 1024 / 1024)) GiB are free: make room, or set XDG_CACHE_HOME to another disk"
}

# lock NAME: takes the lock of NAME, so that one build of NAME runs at a time. The lock is held
# until this script, and all processes that it started, have ended. A script that holds the lock
# continues.
declare -A locked=()
lock() {
	local fd
	[ -z "${locked[$1]-}" ] || return 0
	exec {fd}>"$cache/$1.lock"
	if ! flock -n "$fd"; then
		say "waiting for another build of $1 to end"
		flock "$fd" || die "the wait for $cache/$1.lock was interrupted; the same command starts it again"
	fi
	locked[$1]=yes
}

# steps LABEL...: the steps of the command that is running, also in the scripts that it calls.
steps() {
	[ -n "${VMGENID_STEPS-}" ] || VMGENID_STEPS=$(printf '%s\n' "$@") VMGENID_START=$(date +%s)
	export VMGENID_STEPS VMGENID_START
}

# step LABEL LOG COMMAND...: runs COMMAND with its output in LOG, shows its progress, and
# prints the error if it fails. A step of less than $quiet_below seconds prints nothing.
step() {
	local label=$1 log=$2 start=$SECONDS pid rc=0 shown=0 last number
	shift 2
	number=$(grep -nxF "$label" <<<"${VMGENID_STEPS-}" | cut -d: -f1 || true)
	[ -z "$number" ] || label="[$number/$(wc -l <<<"$VMGENID_STEPS")] $label"
	: >"$log"
	# In a process group of its own: Ctrl-C, or the end of this script, ends
	# all of the step.
	set -m
	"$@" >"$log" 2>&1 </dev/null &
	pid=$!
	set +m
	trap 'kill -- "-$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; say "interrupted; the same command starts it again"; exit 130' INT TERM HUP
	while kill -0 "$pid" 2>/dev/null; do
		sleep 1
		if [ $((SECONDS - start - shown)) -ge 20 ]; then
			shown=$((SECONDS - start))
			last=$(tail -c 200 "$log" | tr -c '[:print:]\n' ' ' | tail -n 1 | cut -c1-90)
			say "  $label: ${shown} s$(elapsed)  ($last)"
		fi
	done
	wait "$pid" || rc=$?
	trap - INT TERM HUP
	if [ "$rc" -ne 0 ]; then
		# The log may be in the incomplete folder, which is removed.
		cp "$log" "$cache/failed.log" 2>/dev/null || true
		grep -q 'No space left on device' "$log" &&
			die "$label: the disk is full: make room in $cache (or in /var/tmp) and run the same command again"
		grep -qiE 'failure resolving|could not resolve|network is unreachable|could not connect|connection (refused|timed out)|no matching distribution found' "$log" &&
			die "$label: a package or crate could not be fetched: connect this machine to the network, then run the same command again ($cache/failed.log says what was wanted)"
		tail -n 20 "$log" >&2
		die "$label failed (exit status $rc), see $cache/failed.log; the same command starts it again"
	fi
	[ $((SECONDS - start)) -lt "${quiet_below:-0}" ] || say "  $label: done in $((SECONDS - start)) s$(elapsed)"
}

# The time of all steps so far.
elapsed() {
	[ -z "${VMGENID_START-}" ] || printf ', all: %d s' $(($(date +%s) - VMGENID_START))
}

# fresh FOLDER: makes an empty FOLDER.tmp. Removes incomplete folders of its kind, also those with
# other keys.
fresh() {
	rm -rf "${1%-*}"-????????????.tmp
	mkdir -p "$1.tmp"
}

# finish FOLDER: FOLDER.tmp is complete.
finish() {
	sync -f "$1.tmp"
	mv -T "$1.tmp" "$1"
}

# need COMMAND PACKAGE: installs a tool of the host if it is missing and this user may install it.
need() {
	command -v "$1" >/dev/null && return
	if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
		say "  installing $2"
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2"; } \
			>"$cache/apt.log" 2>&1 || { tail -n 5 "$cache/apt.log" >&2; die "cannot install the package $2: install it by hand"; }
	else
		die "the command $1 is missing: install it as root with: apt-get install mmdebstrap bubblewrap uidmap"
	fi
}

# The mirror that this machine takes its own Debian from, or VMGENID_MIRROR.
mirror() {
	[ -z "${VMGENID_MIRROR-}" ] || { echo "$VMGENID_MIRROR"; return; }
	apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
		awk '$1 ~ /^(bookworm|trixie)$/ && !found++ { print $2 }'
}

# shellcheck disable=SC2034 # scripts/buildroot also uses it.
no_mirror="apt knows no source of Debian 12 or 13 to take the mirror from: run apt-get update, or set VMGENID_MIRROR to the URL of a Debian mirror"

# bootstrap TAR PACKAGES [MMDEBSTRAP-ARGUMENT...]: a small Debian, with these packages (and commas
# between them), as an archive. Ordinary users can also make one.
bootstrap() {
	local tar=$1 packages=$2 temp=${1%/*}/tmp uri
	shift 2
	if [ "$(id -u)" -ne 0 ]; then
		# Subordinate users work in there, who cannot get into every home.
		temp=/var/tmp/vmgenid-$(id -u)-$(hash "$tar")
		unshare --map-root-user --map-auto rm -rf "$temp"
	fi
	uri=$(mirror)
	[ -n "$uri" ] || die "$no_mirror"
	mkdir -m 711 "$temp"
	printf '%s\n' "deb $uri trixie main" "deb $uri trixie-backports main" |
		TMPDIR=$temp mmdebstrap --variant=minbase --include="$packages" \
			--aptopt='Acquire::Retries "5"' --dpkgopt=force-unsafe-io "$@" trixie - - >"$tar" || return 1
	rm -rf "$temp"
}

# make_tools FOLDER: a second, small root in FOLDER/root, with $packages (and commas between them).
make_tools() {
	bootstrap "$1/root.tar" "$packages"
	mkdir "$1/root"
	tar -C "$1/root" --no-same-owner --exclude='./dev/*' -xf "$1/root.tar"
	rm "$1/root.tar"
	# Mount points for the host's own.
	: >"$1/root/etc/resolv.conf"
	: >"$1/root/etc/hosts"
	mkdir -p "$1/root/etc/ssl/certs"
	: >"$1/root/etc/ssl/certs/ca-certificates.crt"
}

# Where cargo builds. Each checkout has a folder of its own: cargo tells packages apart by their
# paths within the workspace, and would take a later build of another checkout for one of this
# checkout.
target=$cache/target-$(hash "$top")

# inside COMMAND...: runs COMMAND in the build root (or in that of the folder $inside),
# with the cache and the checkout at the same paths as outside.
inside() {
	local root=${inside:-$links/buildroot}/root dir var cargo args=()
	for dir in "$root"/usr/*/; do
		dir=${dir%/}
		args+=(--ro-bind "$dir" "/usr/${dir##*/}")
	done
	for dir in bin sbin lib lib64; do
		args+=(--symlink "usr/$dir" "/$dir")
	done
	args+=(--ro-bind "$root/etc" /etc --ro-bind "$root/var/lib/dpkg" /var/lib/dpkg)
	args+=(--dev /dev --proc /proc --tmpfs /tmp --tmpfs /run)
	# The network is the host's: its resolver, its certificates, its proxies.
	for var in resolv.conf hosts; do
		[ -e "/etc/$var" ] && args+=(--ro-bind "/etc/$var" "/etc/$var")
	done
	[ -e /etc/ssl/certs/ca-certificates.crt ] &&
		args+=(--ro-bind /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt)
	args+=(--bind "$cache" "$cache" --bind "$top" "$top" --clearenv)
	case $PWD/ in
	"$top"/* | "$cache"/*) args+=(--chdir "$PWD") ;;
	*) args+=(--chdir "$top") ;;
	esac
	mkdir -p "$cache/cargo"
	cargo=${CARGO_HOME:-$HOME/.cargo}/config.toml
	# A mirror of the crates registry that the machine is set up for.
	if [ -e "$cargo" ] && grep -q '^ *\[source' "$cargo"; then
		args+=(--ro-bind "$cargo" "$cache/cargo/config.toml")
	fi
	while IFS= read -r var; do
		case $var in
		http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY | TERM | CARGO_HTTP_* | CARGO_NET_* | CARGO_REGISTRIES_* | CARGO_SOURCE_*)
			args+=(--setenv "$var" "${!var}") ;;
		esac
	done < <(compgen -e)
	bwrap "${args[@]}" \
		--setenv PATH /usr/lib/ccache:/usr/sbin:/usr/bin \
		--setenv HOME "$cache/cargo" \
		--setenv LANG C.UTF-8 \
		--setenv SSL_CERT_FILE /etc/ssl/certs/ca-certificates.crt \
		--setenv CARGO_HOME "$cache/cargo" \
		--setenv CARGO_TARGET_DIR "$target" \
		--setenv CCACHE_DIR "$cache/ccache" \
		--setenv CCACHE_BASEDIR "$cache" --setenv CCACHE_NOHASHDIR 1 \
		--die-with-parent -- "$@"
}

# debs FOLDER PACKAGE...: downloads packages, with what they need beyond the build root, and unpacks
# them into FOLDER/root. The build root stays as it is: apt's own files are also in FOLDER.
debs() {
	local dir=$1
	shift
	mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial" "$dir/root"
	local apt=(inside apt-get -q -y -o Dir::State::Lists="$dir/apt/lists" -o Dir::Cache="$dir/apt"
		-o APT::Sandbox::User=root -o Acquire::Retries=5 -o Acquire::Languages=none -o APT::Update::Error-Mode=any)
	"${apt[@]}" update
	"${apt[@]}" --no-install-recommends --download-only -o Debug::NoLocking=1 install "$@"
	# Inside, so that the host needs no dpkg.
	inside sh -ec 'for deb in "$1"/apt/archives/*.deb; do dpkg-deb -x "$deb" "$1/root"; done' - "$dir"
	rm -rf "$dir/apt"
}
