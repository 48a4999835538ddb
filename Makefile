# Every task of this repository by name; `make` alone lists them.
#
# Tools that are built from source are pinned here and kept outside of the checkout, in $(CACHE).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

CACHE := $(or $(KEYSTONE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/keystone-mesh)
TARGET := $(or $(CARGO_TARGET_DIR),target)

CARGO_CYCLONEDX_VERSION := 0.5.9
CARGO_DENY_VERSION := 0.20.2
CARGO_FUZZ_VERSION := 0.13.2
CARGO_CYCLONEDX := $(CACHE)/cargo-cyclonedx-$(CARGO_CYCLONEDX_VERSION)/bin/cargo-cyclonedx
CARGO_DENY := $(CACHE)/cargo-deny-$(CARGO_DENY_VERSION)/bin/cargo-deny
CARGO_FUZZ := $(CACHE)/cargo-fuzz-$(CARGO_FUZZ_VERSION)/bin/cargo-fuzz

# Seconds for each fuzz target, and which ones (all, unless given).
FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?=

# More arguments for the program of a task: make lab ARGS='--keep', make bench ARGS='seal'.
ARGS ?=

.PHONY: help
help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

##### See it work

.PHONY: lab
lab: ## Play the home-and-cloud scenario with real daemons on a small internet (ARGS='--list' for others)
	cargo build --locked --release -p keystone-mesh -p keystone-controller -p keystone-scenarios
	$(TARGET)/release/keystone-lab $(ARGS)

##### Tests

.PHONY: test
test: deps lint doc ## Everything that must hold: lint, docs, tests of all rings; says what is skipped and why
	tests/scripts/test --locked $(ARGS)

.PHONY: test-fast
test-fast: ## Machines only: unit and property tests in virtual time, no namespaces, no root
	cargo test --locked --workspace --lib $(ARGS)

.PHONY: test-peers
test-peers: ## Install wireguard-go and boringtun-cli, which the interoperability tests talk to
	tests/peers/install

.PHONY: test-peers-path
test-peers-path: ## Print the directory of `wireguard` (wireguard-go) and `boringtun-cli`
	@tests/peers/install --path

.PHONY: test-assets
test-assets: ## Build the Kubernetes, its tests, etcd and Helm that the tests run (some minutes, once per version)
	tests/assets/install
	tests/assets/install-e2e
	tests/assets/install-helm

.PHONY: test-assets-path
test-assets-path: ## Print the directory of kube-apiserver, etcd, kubelet, kubectl, ...
	@tests/assets/install --path

# cargo-fuzz instruments with a nightly compiler, which rustup brings where it is missing (tests/fuzz/rust-toolchain.toml).
.PHONY: fuzz
fuzz: $(CARGO_FUZZ) ## Fuzz each decoder of outside bytes for FUZZ_SECONDS (600); FUZZ_TARGETS='a b' for some
	PATH=$(dir $(CARGO_FUZZ)):$$PATH tests/fuzz/run.sh $(FUZZ_SECONDS) $(FUZZ_TARGETS)

##### Measurements

.PHONY: bench
bench: ## Micro-benchmarks (criterion); ARGS='seal' for some
	cargo bench --locked --workspace --benches -- $(ARGS)

.PHONY: bench-peers
bench-peers: deps test-peers ## Throughput and CPU against raw veth, wireguard-go and boringtun-cli, interleaved
	cargo build --locked --release -p keystone-mesh -p keystone-controller -p keystone-scenarios
	PATH=$$(tests/peers/install --path):$$PATH $(TARGET)/release/keystone-lab bench-peers $(ARGS)

.PHONY: bench-cni
bench-cni: deps ## The CNI plugin beside ptp and bridge with host-local: what each verb does, and how long it takes
	tests/peers/cni/install
	cargo rustc --locked --profile small -p keystone-cni --bin keystone-cni -- -C target-feature=+crt-static
	cargo run --locked --quiet -p keystone-cni --example compare -- --plugin $(TARGET)/small/keystone-cni \
		--newer $$(tests/peers/cni/install --path) $(ARGS)

##### Checks

.PHONY: lint
lint: $(CARGO_DENY) ## Formatting, clippy, licences, duplicate and banned crates
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO_DENY) --log-level error --locked check bans licenses sources

.PHONY: advisories
advisories: $(CARGO_DENY) ## Known vulnerabilities of our crates; fetches the RustSec database from GitHub
	$(CARGO_DENY) --locked check advisories

.PHONY: doc
doc: ## Build the API documentation; warnings are errors
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps

##### Kubernetes

.PHONY: image
image: $(CARGO_CYCLONEDX) ## Build the container image and its bill of materials into out/ (PROFILE=dev for a quick one)
	deploy/image/build
	PATH=$(dir $(CARGO_CYCLONEDX)):$$PATH deploy/image/sbom

.PHONY: lab-programs
lab-programs: deps test-assets
	cargo build --locked --release -p keystone-mesh -p keystone-controller -p keystone-scenarios

.PHONY: kubernetes-e2e
kubernetes-e2e: lab-programs ## Kubernetes' own network conformance on three kubelets behind NATs (ARGS='--plugins reference')
	$(TARGET)/release/keystone-lab kubernetes-e2e --suite conformance $(ARGS)

.PHONY: netpol-e2e
netpol-e2e: lab-programs ## Kubernetes' own tests of NetworkPolicy, but for SCTP, on the same cluster
	$(TARGET)/release/keystone-lab kubernetes-e2e --suite netpol $(ARGS)

.PHONY: cni-conformance
cni-conformance: lab-programs ## Conformance on ours and on the reference plugins; writes docs/cni-conformance.md
	results=$$(mktemp -d); trap 'rm -rf "$$results"' EXIT; \
	for plugins in keystone reference; do \
		$(TARGET)/release/keystone-lab kubernetes-e2e --json --plugins $$plugins >$$results/$$plugins.json; \
	done; \
	tests/scripts/cni-conformance $$results/keystone.json $$results/reference.json >docs/cni-conformance.md

.PHONY: chart
chart: ## Check the Helm chart with every set of values (builds Helm, some minutes, once per version)
	helm=$$(tests/assets/install-helm)/helm; \
	for values in deploy/chart/keystone-mesh/{values.yaml,ci/*}; do \
		$$helm lint --strict --quiet deploy/chart/keystone-mesh --values $$values; \
		$$helm template keystone-mesh deploy/chart/keystone-mesh --namespace keystone-mesh --values $$values >/dev/null; \
	done

.PHONY: manifests
manifests: ## Render deploy/manifests from the chart, and deploy/crds from the code
	cargo run --locked --quiet -p keystone-controller -- crds --directory deploy/crds
	deploy/manifests/render >deploy/manifests/keystone-mesh.yaml.new
	mv deploy/manifests/keystone-mesh.yaml.new deploy/manifests/keystone-mesh.yaml

##### The machine

.PHONY: deps
deps: ## Install the system programs that lab and tests call (Debian, as root), or name them
	tests/scripts/deps

.PHONY: clean
clean: ## Remove what was built in the checkout
	cargo clean
	rm -rf tests/fuzz/target tests/fuzz/artifacts tests/fuzz/coverage out

.PHONY: clean-cache
clean-cache: ## Remove the tools and test peers outside of the checkout
	rm -rf $(CACHE)

# Some minutes on two cores, once per version.
$(CARGO_CYCLONEDX) $(CARGO_DENY) $(CARGO_FUZZ):
	tool=$(notdir $@); root=$(patsubst %/bin/$(notdir $@),%,$@); \
	echo "building $$tool $${root##*-}"; \
	env -u CARGO_TARGET_DIR nice cargo install --quiet --locked --root $$root --version $${root##*-} $$tool
