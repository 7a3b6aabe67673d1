#!/bin/bash
# Removes what make has built, and ends clusters that failed tests have kept.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s nullglob
for demo in bin/e2e/*/demo/demo.json bin/bench/demo/demo.json; do
	[ -x bin/twinsan ] || go build -o bin/twinsan ./cmd/twinsan
	bin/twinsan demo clean --dir "$(dirname "$demo")"
done
rm -rf bin
