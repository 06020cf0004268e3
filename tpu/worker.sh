#!/usr/bin/env bash
# What vm.sh runs on each worker of a TPU VM. It needs nothing but bash, python3 and the network.
#
#   worker.sh setup PYTHON EXTRAS [WHEEL]   install jax_it from ~/jax-it-source.tar, at the tested versions
#   worker.sh start COMMAND...              run it in the background, past the end of this connection
#   worker.sh status                        one line: running | exited CODE | lost | none, and the log's last line
#   worker.sh stop [SECONDS]                SIGTERM, so that it saves; SIGKILL after SECONDS (300)
#   worker.sh log [LINES] | follow          the end of the log
set -euo pipefail

HOME_FOLDER=$HOME/jax-it
RUN=$HOME_FOLDER/run
LOG=$RUN/log

setup() {
    local python=$1 extras=$2 wheel=${3:-} version
    is_running && { echo "a run is under way here: stop it first" >&2; exit 2; }
    rm -rf "$HOME_FOLDER/source"
    mkdir -p "$HOME_FOLDER/source"
    tar -xf "$HOME/jax-it-source.tar" -C "$HOME_FOLDER/source"
    # JAX advises it for TPU v5e and newer; without it the start takes longer
    echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null 2>&1 || true
    # The images' own Python may be older than jax_it needs; uv brings the one that is asked for.
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [[ -x $HOME_FOLDER/venv/bin/python ]] || uv venv --quiet --python "$python" "$HOME_FOLDER/venv"
    version=$("$HOME_FOLDER/venv/bin/python" -c 'import sys; print("py%d%d" % sys.version_info[:2])')
    cd "$HOME_FOLDER/source"
    uv pip install --quiet --python "$HOME_FOLDER/venv/bin/python" --reinstall-package jax-it \
        -c "constraints/$version.txt" "${wheel:+./}${wheel:-.}[$extras]"
    "$HOME_FOLDER/venv/bin/jax-it" --help >/dev/null
}

boot() {
    cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown
}

is_running() {
    [[ -f $RUN/pid && ! -f $RUN/code && $(cat "$RUN/boot") == "$(boot)" ]] && kill -0 "$(cat "$RUN/pid")" 2>/dev/null
}

start() {
    if is_running; then
        echo "already running"
        return
    fi
    mkdir -p "$RUN"
    rm -f "$RUN/pid" "$RUN/code"
    boot >"$RUN/boot"
    # The end of the ssh connection must not end the run: a session of its own, and no SIGHUP on the way into it.
    trap '' HUP
    setsid bash "$0" supervise "$@" </dev/null >>"$LOG" 2>&1 &
    echo $! >"$RUN/pid"
}

# Runs the command, passes SIGTERM on to it, and leaves its exit code.
supervise() {
    local child code=0
    cd "$HOME_FOLDER/source"
    if [[ -f $HOME/jax-it-env ]]; then
        # shellcheck source=/dev/null
        . "$HOME/jax-it-env"
    fi
    export PATH=$HOME_FOLDER/venv/bin:$PATH
    echo "$(date --utc +%FT%TZ) starts: $*"
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    while :; do # a signal ends the wait before the command has ended
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    echo "$(date --utc +%FT%TZ) ended with exit code $code"
    echo "$code" >"$RUN/code.part"
    mv "$RUN/code.part" "$RUN/code"
}

status() {
    local state=none last=""
    [[ -f $LOG ]] && last=$(tail -n 1 "$LOG" | tr '\r' '\n' | tail -n 1 | cut -c 1-200)
    if [[ -f $RUN/code ]]; then
        state="exited $(cat "$RUN/code")"
    elif is_running; then
        state=running
    elif [[ -f $RUN/pid ]]; then
        state=lost
    fi
    echo "jax-it-worker $(hostname) $state | $last"
}

stop() {
    local seconds=${1:-300}
    is_running || return 0
    kill -TERM "$(cat "$RUN/pid")"
    while is_running && ((seconds-- > 0)); do
        sleep 1
    done
    if is_running; then
        kill -KILL -- "-$(cat "$RUN/pid")" || true
        echo 75 >"$RUN/code" # what it would have ended with
    fi
}

main() {
    local verb=${1:-}
    (($#)) && shift
    case $verb in
        setup) setup "$@" ;;
        start) start "$@" ;;
        supervise) supervise "$@" ;;
        status) status ;;
        stop) stop "$@" ;;
        log) tail -n "${1:-100}" "$LOG" ;;
        follow) exec tail -n 100 -F "$LOG" ;;
        *)
            echo "worker.sh: setup, start, status, stop, log or follow is needed" >&2
            exit 2
            ;;
    esac
    exit # bash must read no further: this file may be replaced while a run is under way
}

main "$@"
