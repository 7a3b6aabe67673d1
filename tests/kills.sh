#!/bin/bash
# Kills nodes under verified load, COUNT times:
#   tests/kills.sh COUNT [flags of the test binary]
# Ctrl-C, or a SIGTERM, ends it after the round under way, with the total so far.
set -euo pipefail
cd "$(dirname "$0")/.."
count=$1
shift
go test -c -tags e2e -o bin/kills.test ./tests/e2e
cd tests/e2e
# A session of its own: the terminal's Ctrl-C is not for the load generator and the nodes.
setsid ../../bin/kills.test -test.v -test.timeout 0 -test.run '^TestKills$' -kills "$count" "$@" &
pid=$!
trap 'kill -TERM $pid' INT TERM
code=0
while kill -0 "$pid" 2>/dev/null; do
	wait "$pid" && code=0 || code=$?
done
exit "$code"
