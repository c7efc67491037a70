#!/usr/bin/env bash
# One machine as a Ray cluster that asks for a token; stays in the foreground, Ctrl-C ends it. Options go to `ray start`:
#   cluster/single-node/start.sh --num-gpus 2
# The token lies in ~/.ray/auth_token, where every `ray` and `caldpo` of this user finds it; RAY_AUTH_TOKEN takes its place.
set -euo pipefail

export RAY_AUTH_MODE=token
# `ray job stop` interrupts, as Ctrl-C does, and waits; by itself Ray would kill after three seconds.
export RAY_JOB_STOP_SIGNAL=SIGINT RAY_JOB_STOP_WAIT_TIME_S=60
if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [ ! -s "$token_file" ]; then
        mkdir -p "$(dirname "$token_file")"
        (umask 077; head -c 32 /dev/urandom | base64 | tr -d '\n=+/' > "$token_file")
        echo "new token in $token_file"
    fi
    export RAY_AUTH_TOKEN_PATH=$token_file
fi

# Whoever reaches one of Ray's ports and has the token runs code as you. The dashboard listens on this machine alone; the others
# are open to the network, for other machines to join, and metrics ask for no token: a firewall keeps strangers out.
exec ray start --head --block --disable-usage-stats \
    --port="${RAY_GCS_PORT:-6379}" \
    --dashboard-host=127.0.0.1 --dashboard-port="${RAY_DASHBOARD_PORT:-8265}" \
    --metrics-export-port="${RAY_METRICS_PORT:-8080}" \
    "$@"
