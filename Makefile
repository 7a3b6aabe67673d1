# Two commands on a fresh Debian machine with Go: "make demo" and "make test".
# Each target installs what it needs, as root or with sudo; see tests/install.sh.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := build

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X github.com/twinsan/twinsan/server.Version=$(VERSION)
PACKAGES := ./...

# Length of the long runs; "make e2e ROUNDS=5" is a shorter one.
ROUNDS    ?= 50
IMAGE_MIB ?= 1100
ABSENCE   ?= 60s
LOCKS     ?= 1000000
COPY_MIB  ?= 4096
# The last program of the feature level before.
BEFORE    ?= $(shell git log -1 --format=%h~1 -G'FeatureLevel = ' -- server/cluster/level.go)
FUZZTIME  ?= 10s
RUNS      ?= 1
RUN       ?= .
BENCH     ?=
STATES    ?= 1000000
FIRST     ?= 1
KILLS     ?= 1000
MIB       ?= 1024

# Where the race detector is worth its price: whatever shares memory between goroutines.
RACE_PACKAGES := ./cache/... ./dedup/... ./lsfs/... ./replication/... ./server/... ./api/... ./cmd/... ./tests/initiator/...

.PHONY: help build demo test lint unit race fuzz sim sim-short sim-test mutants e2e e2e-short e2e-upgrade conformance kills crash rot bench bench-ha bench-space bench-open bench-budget bench-64t bench-corpus soak gen clean FORCE

## build: the one binary, bin/twinsan
build: bin/twinsan

# Go knows best what is out of date.
bin/twinsan: FORCE
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/twinsan

# The same with costly checks of invariants, for tests.
bin/twinsan-checked: FORCE
	CGO_ENABLED=0 $(GO) build -tags invariants -o $@ ./cmd/twinsan

## demo: two nodes and a witness on this machine, and a tour; EXIT=1 ends it
demo:
	tests/install.sh demo
	$(MAKE) --no-print-directory bin/twinsan
	tests/demo.sh $(if $(EXIT),exit,stay)

## test: everything that must hold before a change goes in
test:
	tests/install.sh e2e
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory sim-short
	$(MAKE) --no-print-directory race
	$(MAKE) --no-print-directory e2e-short

## lint: gofmt, go vet, staticcheck, allowed imports; warnings are errors
lint:
	$(GO) mod download
	@bad=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); if [ -n "$$bad" ]; then echo "not formatted (gofmt -w):"; echo "$$bad"; exit 1; fi
	$(GO) vet -tags invariants,e2e $(PACKAGES)
	$(GO) tool staticcheck -tags invariants,e2e $(PACKAGES)
	$(GO) test ./tests/edges

## unit: all tests of packages, with invariants checked
unit:
	$(GO) test -tags invariants -timeout 20m $(PACKAGES)

## race: the same under the race detector, where goroutines share memory
race:
	tests/install.sh race
	CGO_ENABLED=1 $(GO) test -race -short -timeout 30m $(RACE_PACKAGES)

# Of the simulator: how many seeds, the first one (0: from the clock), virtual time of each.
SEEDS  ?= 1000
SEED   ?= 0
LENGTH ?= 60s

## sim: the cluster in virtual time, SEEDS of them from SEED; STORY=1 tells of one
sim:
	tests/sim.sh $(if $(STORY),story,run) -sim.seeds $(SEEDS) -sim.seed $(SEED) -sim.length $(LENGTH)

# Fresh seeds for each version of the protocol, and the same ones for everybody who tests it.
SIM_SHORT_SEED = $(shell tree=$$(git rev-parse HEAD:replication 2>/dev/null | cut -c1-7); echo $$((0x$${tree:-0} + 1)))

## sim-short: past failures and 2,000 seeds that follow from the code of replication
sim-short:
	tests/sim.sh run -sim.seeds 2000 -sim.seed $(SIM_SHORT_SEED)

## sim-test: past failures, 2,000 fresh seeds or two minutes of them, 50 seeds twice, all partitions
sim-test:
	tests/sim.sh partitions -sim.partitions
	tests/sim.sh twice -sim.seeds 50 -sim.twice 1
	tests/sim.sh run -sim.seeds 2000 -sim.limit 2m

## mutants: the simulator against each rule switched off; MUTANTS= names some
mutants:
	tests/sim.sh mutants -sim.hard -sim.length 25s -sim.budget 8m -sim.mutants '$(MUTANTS)' $(if $(REWRITE),-sim.rewrite)

## fuzz: every fuzz target for FUZZTIME
fuzz:
	tests/fuzz.sh $(FUZZTIME)

# Tests end by themselves; the limit is for those that do not.
e2e-short: bin/twinsan-checked
	tests/e2e.sh 40m -bin $(CURDIR)/bin/twinsan-checked -test.run '$(RUN)'

## e2e: real processes, kills, full devices, at full length (about an hour); RUN= chooses tests
e2e:
	tests/install.sh e2e
	$(MAKE) --no-print-directory bin/twinsan
	tests/e2e.sh 4h -bin $(CURDIR)/bin/twinsan -test.run '$(RUN)' -rounds $(ROUNDS) -image-mib $(IMAGE_MIB) -absence $(ABSENCE) -conformance . -locks $(LOCKS) -copy-mib $(COPY_MIB)

## e2e-upgrade: from the version of commit BEFORE to this one, node by node under load, and back
e2e-upgrade:
	tests/install.sh e2e
	$(MAKE) --no-print-directory bin/twinsan
	rm -rf bin/before && mkdir -p bin/before && git archive $(BEFORE) | tar -x -C bin/before
	cd bin/before && $(GO) build -o twinsan ./cmd/twinsan
	tests/e2e.sh 20m -bin $(CURDIR)/bin/twinsan -before $(CURDIR)/bin/before/twinsan -test.run '^TestUpgrade$$'

## kills: nodes are killed KILLS times under verified load; Ctrl-C ends it with the total so far
kills:
	tests/install.sh e2e
	$(MAKE) --no-print-directory bin/twinsan
	tests/kills.sh $(KILLS)

## crash: STATES crash states of the store, from seed FIRST on
crash:
	$(GO) test ./lsfs -run '^TestCrashStates$$' -v -timeout 0 -crash.states $(STATES) -crash.first $(FIRST)

## rot: one bit flipped in every 4 KiB of a store of MIB
rot:
	$(GO) test ./lsfs -run '^TestRot$$' -v -timeout 0 -rot.mib $(MIB)

## conformance: all of libiscsi's conformance suite on every kind of unit, RUNS times
conformance:
	tests/install.sh e2e
	$(MAKE) --no-print-directory bin/twinsan
	tests/e2e.sh 24h -bin $(CURDIR)/bin/twinsan -test.run '^TestConformance' -conformance . -conformance-runs $(RUNS)

## bench: a table beside tgt, saved below bin/bench; BENCH= are flags of tests/bench
bench:
	tests/install.sh bench
	$(MAKE) --no-print-directory bin/twinsan
	$(GO) run ./tests/bench $(BENCH)

## bench-ha: what resyncs move and how fast, one node beside two, TLS between nodes on beside off
bench-ha:
	tests/install.sh bench
	$(MAKE) --no-print-directory bin/twinsan
	$(GO) run ./tests/bench -no-peer -rows ha $(BENCH)
	$(GO) run ./tests/bench -no-peer -rows mirror $(BENCH)
	$(GO) test ./replication -run '^$$' -bench '^BenchmarkMirror$$' -benchtime 3s -count 3 -timeout 20m
	$(GO) test ./replication -run '^$$' -bench '^BenchmarkResync$$' -benchtime 1x -timeout 20m
	$(GO) test ./replication -run '^TestResyncRate$$' -resync.rates -v -timeout 20m | grep -v level=

## bench-space: throughput, stalls and write amplification of a store by how full it is
bench-space:
	$(GO) run ./tests/space bench $(BENCH)
	$(GO) run ./tests/space plot

## bench-open: how long a pool of 1 TiB of mapped blocks takes to serve after a kill (20 GB of disk)
bench-open:
	$(GO) build -o bin/space-open ./tests/space
	bin/space-open open -keep $(BENCH)
	bin/space-open open -reuse $(BENCH)

## bench-budget: savings and speed with more and less RAM for metadata (10 GB of disk)
bench-budget:
	$(GO) build -o bin/space-budget ./tests/space
	bin/space-budget budget $(BENCH)

## bench-64t: cost per operation and RAM of a pool of 64 TiB (10 GB of disk)
bench-64t:
	$(GO) build -o bin/space-large ./tests/space
	bin/space-large large -gib 64 -metadata 1024 $(BENCH)

## bench-corpus: reduction of images of Debian systems beside btrfs and zstd (12 GB of disk)
bench-corpus:
	tests/install.sh e2e
	$(MAKE) --no-print-directory bin/twinsan
	tests/bench/corpus.sh all bin/corpus

## soak: half an hour at 95 % full, killed each minute, all of it verified each time
soak:
	$(GO) build -o bin/space-soak ./tests/space
	bin/space-soak soak $(BENCH)

## gen: generated code
gen:
	$(GO) generate ./...
	$(GO) run ./api/gen

## clean: what was built, and clusters that failed tests kept
clean:
	tests/clean.sh

help:
	@sed -n 's/^## //p' Makefile
