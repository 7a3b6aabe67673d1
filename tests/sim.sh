#!/bin/bash
# Builds the simulator with its own runtime and runs it:
#   sim.sh run|twice|story|partitions|mutants [flags of the test binary ...]
# See tests/sim/doc.go and docs/testing.md.
set -eu -o pipefail
cd "$(dirname "$0")/.."
mode=$1
shift
out=bin/sim
name=run
mkdir -p "$out"
tags=simruntime
if [ "$mode" = mutants ]; then
	tags=simruntime,mutants name=mutants
fi
go run ./tests/sim/overlay "$out/_overlay"
go test -c -tags "$tags" -overlay "$out/_overlay/overlay.json" -o "$out/$name.test" ./tests/sim
binary=$PWD/$out/$name.test
cd tests/sim
case $mode in
run) exec "$binary" -test.run '^TestCampaign$' -test.timeout 0 -sim.jobs "$(nproc)" -sim.past seeds.txt "$@" ;;
twice) exec "$binary" -test.run '^TestCampaign$' -test.timeout 0 -sim.jobs "$(nproc)" "$@" ;;
story) exec env GOMAXPROCS=1 "$binary" -test.run '^TestSeeds$' -test.v -test.timeout 0 -sim.v "$@" ;;
partitions) exec env GOMAXPROCS=1 "$binary" -test.run '^TestPartitions$' -test.timeout 0 "$@" ;;
mutants) exec "$binary" -test.run '^TestMutants$' -test.timeout 0 -sim.jobs "$(nproc)" "$@" ;;
esac
