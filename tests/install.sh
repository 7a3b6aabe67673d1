#!/bin/bash
# Installs what a make target needs and this machine lacks, on Debian and Ubuntu.
#   tests/install.sh demo|e2e|race|bench
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
missing=()
need() { # PACKAGE TEST...
	local package=$1
	shift
	"$@" >/dev/null 2>&1 || missing+=("$package")
}
have() { command -v "$1"; }
# A block driver that is not installed is named before anything is connected.
qemu_speaks_iscsi() {
	have qemu-img && ! qemu-img info -f raw iscsi://127.0.0.1:1/iqn.2026-11.io.twinsan:none/0 2>&1 | grep -qE 'Unknown (protocol|driver)'
}

case ${1:-} in
demo | e2e | race | bench) ;;
*) echo "usage: $0 demo|e2e|race|bench" >&2 && exit 2 ;;
esac

if ! have go >/dev/null; then
	echo "Go is not installed; twinsan needs the version that go.mod names: https://go.dev/dl" >&2
	exit 1
fi
case $1 in
demo | e2e)
	need qemu-utils have qemu-img
	need qemu-block-extra qemu_speaks_iscsi
	need e2fsprogs have mke2fs
	need libiscsi-bin have iscsi-ls
	;;
esac
case $1 in
e2e | bench) need iproute2 have ip; need libiscsi-dev test -e /usr/include/iscsi/iscsi.h ;;
esac
case $1 in
e2e | race | bench)
	need gcc have cc
	need libc6-dev test -e /usr/include/stdio.h
	need make have make
	;;
esac
case $1 in
bench) need tgt have tgtd ;;
esac

if [ ${#missing[@]} -eq 0 ]; then
	exit 0
fi
apt=(apt-get)
if [ "$(id -u)" -ne 0 ]; then
	if sudo -n true 2>/dev/null; then
		apt=(sudo -n apt-get)
	else
		echo "these packages are missing, and only root can install them:" >&2
		echo "  sudo apt-get install ${missing[*]}" >&2
		exit 1
	fi
fi
if ! have apt-get >/dev/null; then
	echo "these Debian packages, or what they are called here, are missing: ${missing[*]}" >&2
	exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${apt[@]}" update -qq
"${apt[@]}" install -y -qq --no-install-recommends -o Dpkg::Options::=--force-confold "${missing[@]}" >/dev/null
if [ "$1" = bench ] && command -v systemctl >/dev/null && systemctl is-active --quiet tgt 2>/dev/null; then
	echo "the tgt service was started by its package; it is not needed: systemctl disable --now tgt"
fi
