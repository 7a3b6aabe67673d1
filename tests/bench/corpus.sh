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

# names lists the files of packages and of all that they need, those that are here too.
names() { # SUITE PACKAGE...
	local s=$1
	shift
	mkdir -p "$dir/none/partial"
	apt "$s" -o Dir::Cache::archives="$dir/none" install --print-uris --no-install-recommends -y "$@" </dev/null | sed -n "s/^'[^']*' \([^ ]*\) .*/\1/p"
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
		names "$suite" $base $more >"$dir/$name.list"
		# shellcheck disable=SC2086
		apt "$suite" install --download-only --no-install-recommends -y $base $more </dev/null
	done
	if ! command -v mkfs.btrfs >/dev/null || ! command -v duperemove >/dev/null; then
		names bookworm-now btrfs-progs duperemove >"$dir/tools.list"
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
		mke2fs -q -F -t ext4 -d "$tree" -E lazy_itable_init=1,lazy_journal_init=1 "$dir/$name.img" "${size%G}000M" >/dev/null
		echo "$name: $(du -s --apparent-size -BM "$tree" | cut -f1) of files, image of ${size}B, $(du -BM "$dir/$name.img" | cut -f1) allocated"
		rm -rf "$tree"
	done
}

# number JSON PYTHON-EXPRESSION: d is the document.
number() { python3 -c 'import json,sys; d=json.load(open(sys.argv[1])); print(eval(sys.argv[2]))' "$1" "$2"; }
mib() { echo $((($1 + (1 << 19)) >> 20)); }
ratio() { python3 -c 'import sys; print("%.2f" % (float(sys.argv[1])/float(sys.argv[2])))' "$1" "$2"; }

# btrfs of all images: bytes used after copying, and after duperemove. Nothing when this
# machine cannot mount it.
measure_btrfs() {
	local tools=$dir/tools m=$dir/mnt
	if [[ -f $dir/tools.list ]]; then
		unpack "$dir/tools.list" "$tools"
		export PATH=$tools/sbin:$tools/usr/sbin:$tools/bin:$tools/usr/bin:$PATH
		export LD_LIBRARY_PATH=$tools/lib/x86_64-linux-gnu:$tools/usr/lib/x86_64-linux-gnu
	fi
	mkdir -p "$m"
	rm -f "$dir/btrfs.img"
	truncate -s 20G "$dir/btrfs.img"
	mkfs.btrfs -q -m single "$dir/btrfs.img" >/dev/null || return 0
	mount -o loop,compress-force=zstd:3 "$dir/btrfs.img" "$m" || return 0
	trap 'umount "$m"' EXIT
	used() { sync -f "$m"; btrfs filesystem sync "$m"; btrfs filesystem usage -b "$m" | awk '$1 == "Used:" && !n++ {print $2}'; }
	for i in $images; do cp --sparse=always "$dir/$i.img" "$m/"; done
	echo "compressed $(used)"
	nice duperemove -q -d -r "$m" >"$dir/duperemove.out" 2>&1 || true
	echo "duperemove $(used)"
	nice duperemove -q -d -r -b 4k --dedupe-options=partial "$m" >>"$dir/duperemove.out" 2>&1 || true
	echo "duperemove-of-4k-blocks $(used)"
	umount "$m"
	trap - EXIT
	rm -f "$dir/btrfs.img"
}

measure() {
	local twinsan=${TWINSAN:-$here/bin/twinsan} demo=$dir/demo port=${PORT:-14260}
	images=$(images | cut -d' ' -f1)
	local files=() volumes=()
	for i in $images; do files+=("$dir/$i.img"); done
	if [[ -n ${MEASURE:-} ]]; then "$MEASURE" "${files[@]}" >"$dir/corpus.json"; else (cd "$here" && nice go run ./tests/bench/corpus "${files[@]}") >"$dir/corpus.json"; fi

	# The real program: a cluster of two nodes, and each image written to a volume by QEMU.
	while read -r name size _ _; do volumes+=(--volume "$name:${size%G}G"); done < <(images)
	"$twinsan" demo up --detach --dir "$demo" --base-port "$port" --device-size 8G "${volumes[@]}" >"$dir/demo.out" 2>&1
	trap '"$twinsan" demo clean --dir "$demo" >/dev/null 2>&1' EXIT
	export TWINSAN_API=unix://$demo/a/api.sock
	: >"$dir/growth"
	was=0
	for i in $images; do
		"$twinsan" volume show "$i" -o json >"$dir/volume.json"
		lun=$(number "$dir/volume.json" 'd["volume"]["lun"]')
		nice qemu-img convert -n -f raw -O raw "$dir/$i.img" "iscsi://127.0.0.1:$port/iqn.2026-11.io.twinsan:demo/$lun"
		"$twinsan" pool explain a --exact -o json >"$dir/pool.json" 2>/dev/null
		now=$(number "$dir/pool.json" 'd["pools"][0]["volumes_bytes"]')
		echo "$i $now $((now - was))" >>"$dir/growth"
		was=$now
	done
	"$twinsan" pool explain a --exact >"$dir/pool.txt" 2>/dev/null
	stored=$was
	mapped=$(number "$dir/pool.json" 'd["pools"][0]["mapped_bytes"]')
	metadata=$(number "$dir/pool.json" 'd["pools"][0]["metadata_bytes"]')
	# What a quiet day makes of it, with a minute for the day.
	"$twinsan" demo down --dir "$demo" >/dev/null 2>&1
	sed -i 's/^cold-minutes = .*/cold-minutes = 1/' "$demo"/[ab]/twinsan.toml
	"$twinsan" demo up --detach --dir "$demo" >>"$dir/demo.out" 2>&1
	sleep 90
	cold=0 still=0
	while ((still < 6)); do
		sleep 10
		"$twinsan" pool explain a --exact -o json >"$dir/cold.json" 2>/dev/null
		now=$(number "$dir/cold.json" 'd["pools"][0]["volumes_bytes"]')
		((still = now == cold ? still + 1 : 0)) || true
		cold=$now
	done
	"$twinsan" demo clean --dir "$demo" >/dev/null 2>&1
	trap - EXIT
	(measure_btrfs) >"$dir/btrfs" || true

	allocated=$(number "$dir/corpus.json" 'sum(i["allocated"] for i in d["images"])')
	echo
	echo "| all images | MiB | ratio |"
	echo "| --- | ---: | ---: |"
	row() { echo "| $1 | $(mib "$2") | $(ratio "$allocated" "$2") |"; }
	row "allocated, without blocks of zeros" "$allocated"
	row "zstd -3, each image as a whole" "$(number "$dir/corpus.json" 'sum(i["zstd"] for i in d["images"])')"
	row "each 4 KiB block once" "$(number "$dir/corpus.json" 'd["unique"]')"
	row "each 4 KiB block once, zstd -3 of 128 KiB together (bound)" "$(number "$dir/corpus.json" 'd["unique_zstd"]')"
	while read -r how bytes; do row "btrfs zstd:3, $how" "$bytes"; done <"$dir/btrfs"
	row "twinsan: blocks" "$stored"
	row "twinsan: blocks and metadata" "$((stored + metadata))"
	row "twinsan: blocks, after a quiet day" "$cold"
	row "twinsan: blocks and metadata, after a quiet day" "$((cold + metadata))"
	echo
	echo "twinsan maps $(mib "$mapped") MiB."
	echo
	echo "| image | provisioned | allocated | added to the pool | backup: allocated blocks, zstd -3 |"
	echo "| --- | ---: | ---: | ---: | ---: |"
	while read -r name size suite more; do
		one() { number "$dir/corpus.json" "[i['$1'] for i in d['images'] if i['name']=='$name'][0]"; }
		grown=$(sed -n "s/^$name [0-9]* //p" "$dir/growth")
		echo "| $name ($suite${more:+, $more}) | ${size%G} GB | $(mib "$(one allocated)") MiB | $(mib "$grown") MiB | $(mib "$(one zstd)") MiB |"
	done < <(images)
}

case $what in
fetch) fetch ;;
build) build ;;
measure) measure ;;
btrfs) images=$(images | cut -d' ' -f1) && measure_btrfs ;; # that part of measure alone
all) fetch && build && measure ;;
clean) rm -rf "$dir" ;;
*) echo "no such step: $what" >&2 && exit 2 ;;
esac
