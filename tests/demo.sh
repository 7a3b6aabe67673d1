#!/bin/bash
# What "make demo" does: a demo cluster, a tour, and then it stays up.
#   tests/demo.sh stay|exit
set -euo pipefail
cd "$(dirname "$0")/.."
twinsan=bin/twinsan

started() { [ -e twinsan-demo/demo.json ]; }
if started; then
	echo "a demo is here already (./twinsan-demo); going on with it"
fi
failed() {
	echo >&2
	echo "The demo failed. Its logs: twinsan-demo/*/node.log. Remove it: $twinsan demo clean" >&2
}
trap failed ERR
$twinsan demo up --detach
$twinsan demo tour
trap - ERR
if [ "$1" = exit ]; then
	$twinsan demo clean
	exit 0
fi
cat <<END

The demo stays up. The commands above are bin/twinsan in this directory:
  $twinsan demo status      what runs, and how the cluster is
  $twinsan demo kill b      kill -9; then "demo status", "demo start b"
  $twinsan demo pause a     freeze a node; "demo resume a"
  $twinsan demo clean       end it and remove its files
END
