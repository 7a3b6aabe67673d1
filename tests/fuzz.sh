#!/bin/bash
# Runs every fuzz target for a while, one after the other.
#   tests/fuzz.sh [TIME]
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-10s}
targets=0
for package in $(go list ./...); do
	for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		echo "== $package $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package"
		targets=$((targets + 1))
	done
done
echo "fuzz: $targets targets, $time each, no crash"
[ "$targets" -gt 0 ]
