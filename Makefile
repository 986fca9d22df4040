# What a newcomer runs. Everything that is missing is installed by its Debian package name, without
# questions; nothing is installed that is there.

FABRIC ?= vxlan
SERVICES ?= nftables
IP_FAMILY ?= ipv4
KEEP ?=

TARGET := $(or $(CARGO_TARGET_DIR),target)
PORTOLAN := $(TARGET)/release/portolan
PLUGIN := --profile plugin --package portolan-plugin --bin portolan-cni --features program
MUSL_CC := $(shell uname -m)-linux-musl-gcc

.PHONY: demo test lint build plugin clean-labs tools plugin-tools test-tools

# A program and the package that brings it.
DEMO_TOOLS := ip:iproute2 cc:build-essential
PLUGIN_TOOLS := cc:build-essential $(MUSL_CC):musl-dev
TEST_TOOLS := $(DEMO_TOOLS) $(PLUGIN_TOOLS) nft:nftables conntrack:conntrack curl:curl dig:bind9-dnsutils jq:jq \
	kubectl:kubernetes-client etcd:etcd-server openssl:openssl podman:podman crun:crun \
	iptables:iptables ipset:ipset ipvsadm:ipvsadm qemu-system-x86_64:qemu-system-x86 zstd:zstd xz:xz-utils modprobe:kmod

# Installs the packages of the programs in $(1) that are not there.
define install
@missing=""; \
for pair in $(1); do \
	command -v "$${pair%%:*}" >/dev/null 2>&1 || missing="$$missing $${pair##*:}"; \
done; \
if [ -n "$$missing" ]; then \
	echo "installing$$missing" >&2; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get install -y -qq --no-install-recommends $$missing >/dev/null 2>&1 \
	|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; }; \
fi
endef

demo: tools
	@cargo build --release --package portolan --bin portolan
	@$(PORTOLAN) lab demo --fabric $(FABRIC) --services $(SERVICES) --ip-family $(IP_FAMILY) $(if $(KEEP),--keep)

build: plugin
	cargo build --release --package portolan --bin portolan

# The CNI plugin as a file of its own. With musl, and at a fixed address, it starts in a seventh of the time.
plugin: plugin-tools
	cargo rustc $(PLUGIN) -- -C linker=$(MUSL_CC) \
		-C target-feature=+crt-static -C relocation-model=static -C link-arg=-l:libc.a
	@install -D $(TARGET)/plugin/portolan-cni $(TARGET)/release/portolan-cni

# The real API server and the real kube-proxy are built from Debian's source once and kept; without them their
# tests say that they were skipped. What the machine's kernel lacks runs in a guest kernel.
lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy $(PLUGIN) -- -D warnings

test: test-tools
	cargo xtask kube-apiserver || echo "tests with a real API server will be skipped" >&2
	cargo xtask kube-proxy || echo "tests with a real kube-proxy will be skipped" >&2
	cargo xtask test

# Takes down every lab that is up.
clean-labs:
	@for lab in /run/portolan/labs/*/; do \
		[ -e "$$lab" ] && $(PORTOLAN) lab down --name "$$(basename "$$lab")"; \
	done; true

tools:
	$(call install,$(DEMO_TOOLS))

plugin-tools:
	$(call install,$(PLUGIN_TOOLS))

# A busybox that needs no libraries has the name of one that does, so here the package is asked for.
test-tools:
	$(call install,$(TEST_TOOLS))
	@dpkg -s busybox-static >/dev/null 2>&1 \
	|| DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends busybox-static >/dev/null
