# Checks of a test, and what a configuration needs: sourced by the tests here in the repository's directory.
# shellcheck shell=bash disable=SC2154
#
# The test sets failed=0, work (a directory for its own files) and program; a failed check sets failed to 1.

# --- Checks ---

check() {
    local what="$1"
    shift
    local output
    if output="$("$@" 2>&1)"; then
        printf 'ok      %s\n' "$what"
    else
        printf 'FAILED  %s\n%s\n' "$what" "$output"
        # shellcheck disable=SC2034
        failed=1
    fi
}

# Waits for something to become true, a minute at most.
eventually() {
    for _ in $(seq 300); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "still not after a minute: $*"
    return 1
}

fails() { ! "$@"; }
# Lines in a file.
at_least() { [ "$(cat "$2" 2>/dev/null | wc -l)" -ge "$1" ]; }

# --- What a configuration needs ---

# Writes to work: a CA, a certificate for 127.0.0.1 with its key, a signing key with its key set, and a token.
make_secrets() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '/CN=Test CA' \
        -keyout "$work/ca-key.pem" -out "$work/ca.pem" 2>/dev/null
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj '/CN=localhost' \
        -keyout "$work/key.pem" -out "$work/request.pem" 2>/dev/null
    openssl x509 -req -in "$work/request.pem" -CA "$work/ca.pem" -CAkey "$work/ca-key.pem" -CAcreateserial -days 2 \
        -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n') \
        -out "$work/cert.pem" 2>/dev/null
    "$program" keygen --dir "$work/keys" >/dev/null
    printf 'Bearer %s\n' "$(openssl rand -hex 24)" >"$work/token"
}
