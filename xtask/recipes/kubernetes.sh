#!/bin/sh
# Builds one program of Debian 12's source package of Kubernetes, and nothing but it.
#
#     kubernetes.sh kube-apiserver|kube-proxy DIRECTORY
#
# The binary ends up as DIRECTORY/PROGRAM; if it is there already, nothing happens.
# Everything comes from the Debian mirror that apt already uses: the compiler, the source, and one
# library. The machine's own apt sources are not changed. About 3 minutes and 2 GB of scratch space.
#
# Debian 12 packages only the client of Kubernetes, but its source package is the whole tree of
# 1.20.2: the newest release whose server can be built from Debian alone.
set -eu

case "$#:${1-}" in
2:kube-apiserver | 2:kube-proxy) program=$1 ;;
*)
    echo "usage: $0 kube-apiserver|kube-proxy DIRECTORY" >&2
    exit 2
    ;;
esac
mkdir -p "$2"
target=$(cd "$2" && pwd)
[ -x "$target/$program" ] && exit 0

release='1.20.5+really1.20.2-1.1+deb12u1'
suite=bookworm

say() { echo "$program: $*" >&2; }

if [ "$(id -u)" -ne 0 ]; then
    say "installing build tools needs root: run this as root once, the binary is kept in $target"
    exit 3
fi

scratch=$(mktemp -d "${TMPDIR:-/tmp}/$program.XXXXXX")
trap 'chmod -R u+w "$scratch" 2>/dev/null; rm -rf "$scratch"' EXIT
trap 'exit 1' INT TERM HUP

say 'installing the compiler (golang-go, make, rsync)'
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install --yes --no-install-recommends \
    golang-go make rsync dpkg-dev openssl golang-github-modern-go-reflect2-dev >/dev/null

# apt with lists of its own: one deb-src line on the mirror in use, nothing of /etc/apt.
mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $suite" | sed -n 1p)
: "${mirror:=http://deb.debian.org/debian}"
mkdir -p "$scratch/lists/partial" "$scratch/archives/partial" "$scratch/source"
echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$scratch/sources.list"
private_apt() {
    apt-get -qq \
        -o "Dir::Etc::SourceList=$scratch/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o "Dir::State::Lists=$scratch/lists" -o "Dir::Cache::Archives=$scratch/archives" "$@"
}

say "fetching the source of $release from $mirror"
cd "$scratch"
private_apt update
private_apt source --download-only "kubernetes=$release"
tar -x -C source --strip-components=1 -f kubernetes_*.orig.tar.gz
tar -x -C source -f kubernetes_*.debian.tar.xz
cd source

# The tree is older than the compiler, which shows in two places of its vendored libraries.
#
# reflect2 reaches into the runtime's map iterator, whose layout has changed: the server crashes on
# the first custom resource. Debian's packaged version knows the new layout.
reflect2=vendor/github.com/modern-go/reflect2
find "$reflect2" -maxdepth 1 -type f \( -name '*.go' -o -name '*.s' \) -delete
find /usr/share/gocode/src/github.com/modern-go/reflect2 -maxdepth 1 -type f \( -name '*.go' -o -name '*.s' \) \
    ! -name '*_test.go' -exec cp -t "$reflect2" {} +

# The schema validators take a value for null when it equals its type's zero value, and since
# reflect.DeepEqual sees through reflect.Value every empty string is null. Only nil is null.
for validator in vendor/github.com/go-openapi/validate/type.go vendor/k8s.io/kube-openapi/pkg/validation/validate/type.go; do
    sed -i 's/data == nil || reflect\.DeepEqual(reflect\.Zero([^{]*) {/data == nil {/' "$validator"
    if grep -q 'DeepEqual(reflect.Zero' "$validator"; then
        say "cannot correct $validator: the source is not the one this recipe was written for"
        exit 4
    fi
done

say 'compiling'
export HOME="$scratch/home" GOCACHE="$scratch/cache" GOTOOLCHAIN=local GO111MODULE=off CGO_ENABLED=0
export KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=clean
mkdir -p "$HOME"
make WHAT="cmd/$program" GOLDFLAGS='-s -w' >"$scratch/build.log" 2>&1 || {
    tail -n 40 "$scratch/build.log" >&2
    say 'the build failed; its last lines are above'
    exit 4
}
# Moved into place in one step: a reader finds the whole binary or none.
install -m 755 "_output/local/go/bin/$program" "$target/.$program.new"
mv "$target/.$program.new" "$target/$program"
say "built $target/$program"
