#!/bin/bash
# Builds and runs the end-to-end tests; what they say is shown as it comes.
#   tests/e2e.sh LIMIT [flags of the test binary]
set -euo pipefail
cd "$(dirname "$0")/.."
limit=$1
shift
go test -c -tags e2e,invariants -o bin/e2e.test ./tests/e2e
go test -c -o bin/initiator.test ./tests/initiator
cd tests/e2e
exec ../../bin/e2e.test -test.v -test.timeout "$limit" "$@"
