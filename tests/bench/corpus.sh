#!/bin/bash
# Builds disk images of near versions of a system from Debian packages, and measures what
# twinsan, btrfs and zstd make of them: the tables of docs/reduction.md.
#
#   tests/bench/corpus.sh fetch DIR      packages, by apt, into DIR (some 250 MB)
#   tests/bench/corpus.sh build DIR      root file systems and ext4 images of 10, 20, 30, 40 and 50 GB
#   tests/bench/corpus.sh measure DIR    the tables; needs bin/twinsan and qemu-img with iSCSI
#   tests/bench/corpus.sh all DIR        all three; "clean DIR" removes everything
#
# It needs 12 GB below DIR and, for btrfs with duperemove, root and loop devices. Nothing
# is installed: tools that are missing are unpacked below DIR.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")/../.." && pwd)
what=${1:-} dir=${2:-}
[[ -n $what && -n $dir ]] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
suites="bookworm bookworm-now trixie"

# What each image holds: name, size, suite, packages beside the base.
base="systemd-sysv udev openssh-server python3 perl less vim-tiny iproute2 rsyslog cron gnupg curl ca-certificates locales"
images() {
	echo "app1 10G bookworm"
	echo "app2 20G bookworm-now"
	echo "web 30G bookworm-now nginx-light php-cli"
	echo "db 40G bookworm-now postgresql-15"
	echo "next 50G trixie nginx-light"
}

apt() { # SUITE COMMAND...
	local a=$dir/apt/$1
	shift
	nice apt-get -qq -o Dir::Etc::sourcelist="$a/sources.list" -o Dir::Etc::sourceparts=/nonexistent -o Dir::State="$a/state" \
		-o Dir::State::status="$a/status" -o Dir::Cache="$a/cache" -o Dir::Cache::archives="$dir/debs" -o APT::Sandbox::User=root -o Debug::NoLocking=1 "$@"
}

fetch() {
	local d=http://deb.debian.org key="[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
	mkdir -p "$dir/debs/partial"
	for s in $suites; do
		local a=$dir/apt/$s
		mkdir -p "$a/state/lists/partial" "$a/cache"
		: >"$a/status"
		echo "deb $key $d/debian ${s%-now} main" >"$a/sources.list"
		if [[ $s == *-now ]]; then
			echo "deb $key $d/debian ${s%-now}-updates main
deb $key $d/debian-security ${s%-now}-security main" >>"$a/sources.list"
		fi
		apt "$s" update
	done
	images | while read -r name _ suite more; do
		# shellcheck disable=SC2086
		apt "$suite" install --print-uris --no-install-recommends -y $base $more </dev/null | sed -n "s/^'[^']*' \([^ ]*\) .*/\1/p" >"$dir/$name.list"
		# shellcheck disable=SC2086
		apt "$suite" install --download-only --no-install-recommends -y $base $more </dev/null
	done
	if ! command -v mkfs.btrfs >/dev/null || ! command -v duperemove >/dev/null; then
		apt bookworm-now install --print-uris --no-install-recommends -y btrfs-progs duperemove </dev/null | sed -n "s/^'[^']*' \([^ ]*\) .*/\1/p" >"$dir/tools.list"
		apt bookworm-now install --download-only --no-install-recommends -y btrfs-progs duperemove </dev/null
	fi
}

unpack() { # LIST TREE
	mkdir -p "$2"
	while read -r deb; do dpkg-deb -x "$dir/debs/$deb" "$2"; done <"$1"
}

build() {
	images | while read -r name size _ _; do
		local tree=$dir/tree
		rm -rf "$tree" "$dir/$name.img"
		unpack "$dir/$name.list" "$tree"
		# What makes one machine differ from another: names, keys, logs.
		echo "$name" >"$tree/etc/hostname"
		mkdir -p "$tree/var/log" "$tree/root" "$tree/etc/ssh"
		head -c 64K /dev/urandom >"$tree/etc/ssh/keys"
		for i in $(seq 20000); do echo "Nov 21 12:$((i / 60 % 60)):$((i % 60)) $name kernel: [$((i * 7919 % 100003)).$((RANDOM))] eth0: link is up, $((RANDOM)) packets"; done >"$tree/var/log/messages"
		mke2fs -q -F -t ext4 -d "$tree" -E lazy_itable_init=1,lazy_journal_init=1 "$dir/$name.img" "${size%G}000M"
		echo "$name: $(du -s --apparent-size -BM "$tree" | cut -f1) of files, image of ${size}B, $(du -BM "$dir/$name.img" | cut -f1) allocated"
		rm -rf "$tree"
	done
}

case $what in
fetch) fetch ;;
build) build ;;
esac
