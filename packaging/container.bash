# Boots a small system in a container, for the tests here: they source this file in the repository's directory, as root.
# shellcheck shell=bash disable=SC2154
#
# Sets root (the container's file system), work (a directory for the test's own files) and failed (whether a check
# failed), and removes the container when the test ends. The test sets program, which sends batches from outside.
#
# Needs debootstrap, systemd-nspawn, curl and openssl. The container has a network of its own with nothing but
# loopback, so no port of the machine is used. Systems are made once, from the mirror that apt uses, and kept in
# target/systemd-root-RELEASE.

[ "$(id -u)" -eq 0 ] || { echo "$0: run it as root, which a container needs" >&2; exit 2; }
for tool in debootstrap systemd-nspawn nsenter curl openssl; do
    command -v "$tool" >/dev/null || { echo "$0: $tool is not installed" >&2; exit 2; }
done

mkdir -p target
root="$(mktemp -d "$PWD/target/systemd-test.XXXXXX")"
work="$(mktemp -d)"
# A process of the test in the background, which ends with it.
load=''
failed=0
nspawn='' leader=''

# --- The container ---

# The mirror, release and first component that apt installs this system's packages from.
mirror() {
    local codename
    # shellcheck disable=SC1091
    codename="$(. /etc/os-release && echo "$VERSION_CODENAME")"
    apt-get indextargets --format '$(CODENAME) $(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
        awk -v codename="$codename" '$1 == codename { print; exit }'
}

# Puts a fresh system into root: of the release that is named, or else of this machine's.
make_system() {
    local codename uri component kept
    read -r codename uri component < <(mirror)
    codename="${1:-$codename}"
    kept="$PWD/target/systemd-root-$codename"
    [ -e "$kept/complete" ] || install_system "$codename" "$uri" "$component" "$kept"
    cp -a --reflink=auto "$kept/system/." "$root"
    # Nothing configures this network, so nothing waits until it is.
    ln -s /dev/null "$root/etc/systemd/system/systemd-networkd-wait-online.service"
}

install_system() {
    local codename="$1" uri="$2" component="$3" kept="$4"
    rm -rf "$kept"
    mkdir -p "$kept"
    echo "making a system of $codename from $uri"
    if ! debootstrap --variant=minbase --components="$component" --include=systemd,systemd-sysv,dbus \
        "$codename" "$kept/system" "$uri" >"$kept/log" 2>&1; then
        tail -n 20 "$kept/log" >&2
        exit 1
    fi
    rm -rf "$kept/system/var/cache/apt/archives"/*.deb "$kept/system/var/lib/apt/lists"/*
    touch "$kept/complete"
}

boot() {
    systemd-nspawn --quiet --directory="$root" --machine="auditgate-test-$$" --register=no --keep-unit --boot \
        --private-network --console=read-only </dev/null >"$work/console" 2>&1 &
    nspawn=$!
    for _ in $(seq 300); do
        leader="$(pgrep --parent "$nspawn" --oldest || true)"
        if [ -n "$leader" ] && inside systemctl is-system-running 2>/dev/null | grep -qE 'running|degraded'; then
            return
        fi
        kill -0 "$nspawn" 2>/dev/null || break
        sleep 0.2
    done
    cat "$work/console" >&2
    echo "the container did not boot" >&2
    exit 1
}

clean_up() {
    status=$?
    trap - EXIT
    [ -z "$load" ] || kill "$load" 2>/dev/null || true
    if [ -n "$leader" ] && kill -0 "$leader" 2>/dev/null; then
        [ "$status" -eq 0 ] || inside journalctl --no-pager --unit=auditgate.service --unit=auditgate.socket -n 60 >&2 || true
        inside systemctl --force poweroff >/dev/null 2>&1 || true
        for _ in $(seq 150); do kill -0 "$nspawn" 2>/dev/null || break; sleep 0.2; done
    fi
    if [ -n "$nspawn" ] && kill -0 "$nspawn" 2>/dev/null; then
        kill -KILL "$nspawn" 2>/dev/null || true
    fi
    [ -z "$nspawn" ] || wait "$nspawn" 2>/dev/null || true
    rm -rf --one-file-system "$root" "$work"
    exit "$status"
}
trap clean_up EXIT

# Runs a command in the container, as its root.
inside() { nsenter --target "$leader" --mount --uts --ipc --net --pid --cgroup --root --wdns=/ -- "$@"; }

# Runs a command of this machine in the container's network, where 127.0.0.1 is the container's.
beside() { nsenter --target "$leader" --net -- "$@"; }

# --- Checks ---

. packaging/checks.bash

property() { inside systemctl show --value --property="$1" "${2:-auditgate.service}"; }
is() { local found; found="$(property "$1" "${3:-auditgate.service}")"; [ "$found" = "$2" ] || { echo "$1 is $found, not $2"; return 1; }; }
logged() { inside journalctl --no-pager --output=cat --unit=auditgate.service | grep -F -- "$1"; }
main_pid() { property MainPID; }
admin() { curl -sS --fail --unix-socket "/proc/$leader/root/run/auditgate/admin.sock" "http://localhost$1"; }
ready() { [ "$(admin /readyz)" = ready ]; }
# No retries: whatever goes wrong is seen.
send() { beside "$program" send --to https://127.0.0.1:8443/konnect/us --ca "$work/ca.pem" --authorization-file "$work/token" --retries 0 "$@"; }
generate() { send --key "$work/keys/signing-key.pem" "$@"; }
lines() { inside sh -c 'cat /var/log/auditgate/verified.log | wc -l'; }
has_lines() { local found; found="$(lines)"; [ "$found" -eq "$1" ] || { echo "verified.log has $found lines, not $1"; return 1; }; }
