#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one slice or several, through queued resources.
#
#   tpu/vm.sh VERB --name NAME --zone ZONE [OPTIONS] [-- JAX-IT OPTIONS]
#
# Verbs:
#   run      all of it: create, wait, set up, start, watch; again after a preemption; fetch the logs, delete. Called
#            again it continues the run. Exit code: 0 done; 1 a bug in jax_it; 2 something you can fix; 75 gave up.
#   create   ask for the TPU                        wait     until it is there
#   setup    install jax_it on all workers          start    start the run on all workers, in the background
#   watch    until the run ends; its exit code      status   one line a worker
#   stop     SIGTERM on all workers: save and end   logs     the end of the logs
#   delete   give the TPU back
#
# The TPU:
#   --name NAME             of the queued resource and its nodes
#   --zone ZONE             or CLOUDSDK_COMPUTE_ZONE
#   --project PROJECT       (default: gcloud's own setting)
#   --type TYPE             accelerator type: v5litepod-16, v5p-32, v6e-64, ...   [create, run]
#   --slices N              number of slices, joined over the data-center network (default: 1)
#   --runtime VERSION       of the VM's software (default: the one for the type)
#   --spot | --reserved     preemptible and cheap; from your reservation (default: on demand)
#   --network N, --subnetwork N, --service-account EMAIL, --internal-ip     handed to gcloud
#
# The run:
#   --config NAME[:ARG]     a recipe, or FILE[:ARG] below the current folder, which is sent along   [start, run]
#   --workdir URL           gs://BUCKET/RUN, or a path on a disk that all workers share   [start, run]
#   --cache URL             XLA's compiled programs (default: jax_cache beside the workdir); none: no cache
#   --revision REV          what git calls this checkout's commit to install (default: HEAD)
#   --wheel FILE            install this wheel instead
#   --python 3.11|3.12|3.13 (default: 3.12)
#   --extras LIST           of jax_it to install (default: tpu,gcs)
#   --file PATH             a further file or folder to send, below the current folder; may be repeated
#   --env NAME[=VALUE]      for the run's environment, sent in a file; without VALUE, yours; may be repeated
#
# How:
#   --max-restarts N        (default: 100)
#   --poll SECONDS          between looks (default: 60)
#   --keep                  do not delete the TPU when the run has ended
#   --logs FOLDER           where logs are fetched to (default: runs/logs/NAME)
#   --lines N, --follow     of `logs`: how many lines; go on with the first worker's
#   --dry-run               print every command, run none
#
# Each option can be set in the environment too: JAX_IT_ZONE, JAX_IT_MAX_RESTARTS, ...
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$HERE/common.sh"
ROOT=$(dirname "$HERE")

PATIENCE=10 # looks without an answer, or with some workers ended and others not, before something is done

options() {
    VERB=${1:-}
    case $VERB in
        -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
        run | create | wait | setup | start | watch | status | stop | logs | delete) shift ;;
        "") fail "a verb is missing: run, create, wait, setup, start, watch, status, stop, logs, delete" ;;
        *) fail "unknown verb $VERB; see $PROGRAM --help" ;;
    esac
    NAME=${JAX_IT_NAME:-} ZONE=${JAX_IT_ZONE:-${CLOUDSDK_COMPUTE_ZONE:-}} PROJECT=${JAX_IT_PROJECT:-}
    TYPE=${JAX_IT_TYPE:-} SLICES=${JAX_IT_SLICES:-1} RUNTIME=${JAX_IT_RUNTIME:-} SPOT=${JAX_IT_SPOT:-}
    RESERVED=${JAX_IT_RESERVED:-} NETWORK=${JAX_IT_NETWORK:-} SUBNETWORK=${JAX_IT_SUBNETWORK:-}
    SERVICE_ACCOUNT=${JAX_IT_SERVICE_ACCOUNT:-} INTERNAL_IP=${JAX_IT_INTERNAL_IP:-} CONFIG=${JAX_IT_CONFIG:-}
    WORKDIR=${JAX_IT_WORKDIR:-} CACHE=${JAX_IT_CACHE:-} REVISION=${JAX_IT_REVISION:-HEAD} WHEEL=${JAX_IT_WHEEL:-}
    PYTHON=${JAX_IT_PYTHON:-3.12} EXTRAS=${JAX_IT_EXTRAS:-tpu,gcs} MAX_RESTARTS=${JAX_IT_MAX_RESTARTS:-100}
    POLL=${JAX_IT_POLL:-60} KEEP=${JAX_IT_KEEP:-} LOGS=${JAX_IT_LOGS:-} TAIL=${JAX_IT_LINES:-100} FOLLOW=""
    FILES=() ENVIRONMENT=() ARGUMENTS=()
    local option value
    while (($#)); do
        option=$1 value=""
        shift
        case $option in
            --) ARGUMENTS=("$@") && break ;;
            -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
            --spot) SPOT=1 && continue ;;
            --reserved) RESERVED=1 && continue ;;
            --internal-ip) INTERNAL_IP=1 && continue ;;
            --keep) KEEP=1 && continue ;;
            --follow) FOLLOW=1 && continue ;;
            --dry-run) DRY_RUN=1 && continue ;;
            --*=*) value=${option#*=} option=${option%%=*} ;;
            --*)
                (($#)) && [[ $1 != --* ]] || fail "$option needs a value; see $PROGRAM --help"
                value=$1
                shift
                ;;
            *) fail "unknown word $option; options for jax-it go after --" ;;
        esac
        case $option in
            --name) NAME=$value ;; --zone) ZONE=$value ;; --project) PROJECT=$value ;; --type) TYPE=$value ;;
            --slices) SLICES=$value ;; --runtime) RUNTIME=$value ;; --network) NETWORK=$value ;;
            --subnetwork) SUBNETWORK=$value ;; --service-account) SERVICE_ACCOUNT=$value ;; --config) CONFIG=$value ;;
            --workdir) WORKDIR=$value ;; --cache) CACHE=$value ;; --revision) REVISION=$value ;;
            --wheel) WHEEL=$value ;; --python) PYTHON=$value ;; --extras) EXTRAS=$value ;; --file) FILES+=("$value") ;;
            --env) ENVIRONMENT+=("$value") ;; --max-restarts) MAX_RESTARTS=$value ;; --poll) POLL=$value ;;
            --logs) LOGS=$value ;; --lines) TAIL=$value ;;
            *) fail "unknown option $option; see $PROGRAM --help" ;;
        esac
    done
    check_options
}

check_options() {
    local file name
    need "$NAME" --name
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,57}[a-z0-9])?$ ]] ||
        fail "--name=$NAME: lower-case letters, digits and hyphens, a letter first, at most 59"
    need "$ZONE" --zone
    need_number "$SLICES" --slices 1
    need_number "$MAX_RESTARTS" --max-restarts 0
    need_number "$POLL" --poll 0
    need_number "$TAIL" --lines 1
    [[ ! ($SPOT && $RESERVED) ]] || fail "--spot and --reserved exclude each other"
    LOGS=${LOGS:-runs/logs/$NAME}
    case $VERB in
        run | create)
            need "$TYPE" --type
            case ${RUNTIME:-$TYPE} in
                v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
                v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
                v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
                v2-alpha-*) ;;
                v2-[0-9]* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
                *) [[ $RUNTIME ]] || fail "--type=$TYPE: no default --runtime is known for it; add --runtime VERSION" ;;
            esac
            ;;
    esac
    case $VERB in
        run | start | setup)
            need "$WORKDIR" --workdir
            [[ $WORKDIR == *://* || $WORKDIR == /* ]] ||
                fail "--workdir=$WORKDIR: each worker has its own disk; name a bucket, as gs://BUCKET/RUN"
            ;;
    esac
    case $VERB in
        run | start) need "$CONFIG" --config ;;
    esac
    if [[ $VERB == run || $VERB == setup ]]; then
        [[ $PYTHON =~ ^3\.1[123]$ ]] || fail "--python=$PYTHON: jax_it needs 3.11, 3.12 or 3.13"
        [[ ! $WHEEL || -f $WHEEL ]] || fail "--wheel=$WHEEL: no such file"
        file=$(config_file "$CONFIG")
        [[ ! $file ]] || FILES+=("$file")
        for file in "${FILES[@]}"; do
            [[ $file != /* && $file != ../* ]] || fail "$file: only files below the current folder can be sent"
            [[ -e $file ]] || fail "$file: no such file"
        done
        for name in "${ENVIRONMENT[@]}"; do
            [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] || fail "--env=${name%%=*}: not a variable's name"
            [[ $name == *=* || ${!name+set} ]] || fail "--env=$name: it is not set in your environment; set it"
        done
    fi
    need_program gcloud
}

# --- gcloud -----------------------------------------------------------------------------------------------------------

queued() { # queued VERB [OPTIONS]
    local verb=$1
    shift
    "${CALL[@]}" gcloud compute tpus queued-resources "$verb" "$NAME" "--zone=$ZONE" \
        ${PROJECT:+"--project=$PROJECT"} "$@"
}

node() { # node ssh|scp|describe WORDS...
    local verb=$1
    shift
    "${CALL[@]}" gcloud compute tpus tpu-vm "$verb" "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

node_names() {
    local slice
    if ((SLICES == 1)); then
        echo "$NAME"
    else
        for ((slice = 0; slice < SLICES; slice++)); do
            echo "$NAME-$slice"
        done
    fi
}

# Runs a command on all workers of all slices at the same time; fails if it fails on any.
on_all_workers() {
    local name jobs=() failed=0 number=0
    for name in $(node_names); do
        node ssh "$name" --worker=all "--command=$1" --quiet ${INTERNAL_IP:+--internal-ip} "${SSH_FLAGS[@]}" \
            </dev/null >"$SCRATCH/out.$name" 2>"$SCRATCH/err.$name" &
        jobs+=($!)
    done
    for name in $(node_names); do
        wait "${jobs[number++]}" || failed=1
        cat "$SCRATCH/out.$name"
        ((failed == 0)) && [[ ! $SHOW_ERRORS ]] || cat "$SCRATCH/err.$name" >&2
    done
    return $failed
}
SHOW_ERRORS=""
# A worker that is gone must not hold up the look at the others.
SSH_FLAGS=(--ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=20)

# The line of gcloud's messages that says what went wrong.
reason() {
    grep -m 1 '^ERROR' "$1" || grep . "$1" | tail -n 1
}

# Sets STATE: the queued resource's, or ABSENT, or UNKNOWN where gcloud itself failed.
look_at_resource() {
    local CALL=()
    if STATE=$(queued describe "--format=value(state.state)" 2>"$SCRATCH/describe"); then
        STATE=${STATE:-CREATING}
        UNANSWERED=0 SEEN=1
    elif grep -qiE "NOT_FOUND|was not found|not found" "$SCRATCH/describe"; then
        STATE=ABSENT
        UNANSWERED=0
    else
        STATE=UNKNOWN
        ((++UNANSWERED < PATIENCE)) || fail "gcloud does not answer: $(reason "$SCRATCH/describe")"
        say "gcloud does not answer: $(reason "$SCRATCH/describe")"
    fi
}
SEEN=""
UNANSWERED=$((PATIENCE - 1)) # a gcloud that has never answered is not set up: that is said at once

# Whether a node is gone for good; a worker that does not answer may only be starting.
a_node_is_gone() {
    local CALL=() name state
    for name in $(node_names); do
        state=$(node describe "$name" "--format=value(state)" 2>/dev/null) || continue
        case $state in
            PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | UNKNOWN | HIDDEN | HIDING)
                say "$name is $state"
                return 0
                ;;
        esac
    done
    return 1
}

# Sets WORKERS, one line a worker, and the lists CODES, of those that have ended, and counts RUNNING and NONE.
look_at_workers() {
    local CALL=() name host state code rest
    RUNNING=0 NONE=0 CODES=() LAST=""
    # a worker that is not set up has no script
    on_all_workers "if [ -f jax-it-worker.sh ]; then bash jax-it-worker.sh status; else echo jax-it-worker x none; fi" \
        >"$SCRATCH/workers" 2>"$SCRATCH/silent" || return 1
    WORKERS=$(grep '^jax-it-worker ' "$SCRATCH/workers") || return 1
    while read -r name host state code rest; do
        : "$name" "$host"
        case $state in
            running) RUNNING=$((RUNNING + 1)) LAST=${LAST:-$rest} ;;
            exited) CODES+=("$code") ;;
            lost) CODES+=(137) ;; # killed before it could leave its code
            *) NONE=$((NONE + 1)) ;;
        esac
    done <<<"$WORKERS"
}

# --- verbs ------------------------------------------------------------------------------------------------------------

do_create() {
    local nodes=("--node-id=$NAME")
    ((SLICES == 1)) || nodes=("--node-count=$SLICES" "--node-prefix=$NAME")
    queued create "${nodes[@]}" "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" ${SPOT:+--spot} \
        ${RESERVED:+--reserved} ${NETWORK:+"--network=$NETWORK"} ${SUBNETWORK:+"--subnetwork=$SUBNETWORK"} \
        ${SERVICE_ACCOUNT:+"--service-account=$SERVICE_ACCOUNT"} ${INTERNAL_IP:+--internal-ips} --quiet
}

do_wait() {
    if [[ $DRY_RUN ]]; then
        queued describe "--format=value(state.state)"
        return
    fi
    while :; do
        look_at_resource
        say "$NAME: $STATE"
        case $STATE in
            ACTIVE) return 0 ;;
            ABSENT)
                [[ $VERB == run ]] || fail "no queued resource $NAME in $ZONE"
                return 75
                ;;
            FAILED | SUSPENDING | SUSPENDED | DELETING) return 75 ;;
        esac
        sleep "$POLL"
    done
}

# The checkout at a revision, or a wheel with what it needs beside it, in one archive; and the run's environment.
pack() {
    local archive=$SCRATCH/jax-it-source.tar file name cache
    if [[ $WHEEL ]]; then
        run tar -cf "$archive" -C "$ROOT" constraints configs -C "$(cd "$(dirname "$WHEEL")" && pwd)" \
            "$(basename "$WHEEL")" || return 1
    else
        [[ ! $(git -C "$ROOT" status --porcelain --untracked-files=no 2>/dev/null) ]] ||
            say "uncommitted changes are not sent"
        run git -C "$ROOT" archive --format=tar "--output=$archive" "$REVISION" || return 1
    fi
    for file in "${FILES[@]}"; do
        run tar -rf "$archive" "$file" || return 1
    done
    [[ ! $DRY_RUN ]] || return 0
    cp "$HERE/worker.sh" "$SCRATCH/jax-it-worker.sh"
    cache=$(cache_folder "$WORKDIR" "$CACHE")
    {
        [[ ! $cache ]] || echo "export JAX_COMPILATION_CACHE_DIR=${cache@Q}"
        for name in "${ENVIRONMENT[@]}"; do
            [[ $name == *=* ]] || name=$name=${!name}
            file=${name#*=}
            echo "export ${name%%=*}=${file@Q}"
        done
    } >"$SCRATCH/jax-it-env"
}

do_setup() {
    local name wheel=""
    [[ ! $WHEEL ]] || wheel=$(basename "$WHEEL")
    pack || fail "the source could not be packed; is --revision=$REVISION a commit of $ROOT?"
    for name in $(node_names); do
        node scp "$SCRATCH/jax-it-source.tar" "$SCRATCH/jax-it-worker.sh" "$SCRATCH/jax-it-env" "$name:" --worker=all \
            --quiet ${INTERNAL_IP:+--internal-ip} || return 1
    done
    SHOW_ERRORS=1 on_all_workers "bash jax-it-worker.sh setup $(quoted "$PYTHON" "$EXTRAS" ${wheel:+"$wheel"})"
}

do_start() {
    SHOW_ERRORS=1 on_all_workers "bash jax-it-worker.sh start $(quoted jax-it train --config "$CONFIG" \
        --workdir "$WORKDIR" "${ARGUMENTS[@]}")"
}

do_status() {
    if [[ $DRY_RUN ]]; then
        on_all_workers "bash jax-it-worker.sh status"
        return
    fi
    look_at_workers || fail "not all workers answer: $(reason "$SCRATCH/silent")"
    cut -d ' ' -f 2- <<<"$WORKERS"
}

do_stop() {
    on_all_workers "bash jax-it-worker.sh stop"
}

do_logs() {
    if [[ $FOLLOW ]]; then
        node ssh "$(node_names | head -n 1)" --worker=0 "--command=bash jax-it-worker.sh follow" --quiet \
            ${INTERNAL_IP:+--internal-ip}
    else
        on_all_workers "bash jax-it-worker.sh log $TAIL"
    fi
}

# fetch_logs ATTEMPT: what is left of all workers' logs, one file a worker
fetch_logs() {
    local name folder
    for name in $(node_names); do
        folder=$LOGS/attempt-$1/$name
        run mkdir -p "$folder"
        node ssh "$name" --worker=all "--command=bash jax-it-worker.sh log 100000" "--output-directory=$folder" \
            --quiet ${INTERNAL_IP:+--internal-ip} "${SSH_FLAGS[@]}" </dev/null ||
            say "the logs of $name could not be fetched"
    done
}

do_delete() {
    if [[ $DRY_RUN ]]; then
        queued delete --force --quiet
        return
    fi
    look_at_resource
    while [[ $STATE != ABSENT ]]; do
        [[ $STATE == DELETING || $STATE == UNKNOWN ]] || queued delete --force --quiet || say "will try again"
        look_at_resource
        [[ $STATE == ABSENT ]] || sleep "$POLL"
    done
    SEEN=""
    say "$NAME is deleted"
}

# Looks until the run has ended or the TPU is gone, and returns the run's exit code. With 75, AGAIN says what must be
# done again: start (the program), create (the TPU) or setup (all but the TPU).
do_watch() {
    local silent=0 uneven=0
    if [[ $DRY_RUN ]]; then
        queued describe "--format=value(state.state)"
        on_all_workers "bash jax-it-worker.sh status"
        return
    fi
    while :; do
        look_at_resource
        AGAIN=create
        case $STATE in
            ACTIVE)
                if ! look_at_workers; then
                    say "not all workers answer: $(reason "$SCRATCH/silent")"
                    if a_node_is_gone || ((++silent >= PATIENCE)); then
                        return 75
                    fi
                elif ((NONE)); then
                    AGAIN=setup
                    return 75
                elif ((RUNNING == 0)); then
                    say "the run has ended on all workers: ${CODES[*]}"
                    AGAIN=start
                    return "$(verdict "${CODES[@]}")"
                elif ((${#CODES[@]})) && [[ $(verdict "${CODES[@]}") != 0 ]] && ((++uneven >= PATIENCE)); then
                    # A process that has lost its peers can wait for them for ever.
                    say "$RUNNING workers still run after others have ended (${CODES[*]})"
                    [[ $VERB != run ]] || do_stop || true
                    silent=0 uneven=0
                else
                    silent=0
                    say "running on $RUNNING workers $LAST"
                fi
                ;;
            SUSPENDED | FAILED | ABSENT)
                say "$NAME: $STATE"
                return 75
                ;;
            *) say "$NAME: $STATE" ;;
        esac
        sleep "$POLL"
    done
}

do_run() {
    local restarts=0 setups=0 failures=0 code
    if [[ $DRY_RUN ]]; then
        do_create && do_wait && do_setup && do_start && do_watch && fetch_logs 0
        [[ $KEEP ]] || do_delete
        return
    fi
    trap 'say "$PROGRAM ends, the run does not: the same command watches it, \"$PROGRAM delete\" ends it"; exit 130' \
        INT TERM
    while :; do
        code=0
        do_watch || code=$?
        ((code == 75)) || break
        if [[ $AGAIN == start ]]; then
            fetch_logs $restarts
        fi
        if [[ $AGAIN == start || ($AGAIN == create && $STATE != ABSENT) ]]; then
            ((restarts < MAX_RESTARTS)) || break
            restarts=$((restarts + 1)) setups=0
            say "restart $restarts of at most $MAX_RESTARTS"
        fi
        case $AGAIN in
            create)
                # Preemption leaves a queued resource that is suspended; one that has gone was deleted on purpose.
                [[ $STATE != ABSENT || ! $SEEN ]] || fail "somebody has deleted $NAME, so it is not requested again"
                [[ $STATE == ABSENT ]] || do_delete # what is left of it
                if ! do_create; then
                    # The first time it is a wrong option or a quota; later it may pass.
                    ((restarts && ++failures < 3)) || fail "the TPU could not be requested; gcloud's reason is above"
                elif do_wait; then
                    failures=0
                else
                    queued describe "--format=value(state)" >&2 || true
                    ((++failures < 3)) || fail "$NAME was $STATE three times before it was there; see above"
                fi
                ;;
            setup)
                ((setups++ < 3)) || fail "setup failed three times; $NAME is kept: fix the cause and run this again"
                ((RUNNING == 0)) || do_stop || true
                if do_setup; then
                    do_start || say "the start failed on some workers"
                else
                    say "setup failed on some workers"
                fi
                ;;
            start) do_start || say "the start failed on some workers" ;;
        esac
        sleep "$POLL"
    done
    fetch_logs $restarts
    if [[ $KEEP ]]; then
        say "$NAME is kept, and costs money until \"$PROGRAM delete\""
    else
        do_delete
    fi
    say "exit code $code"
    return $code
}

options "$@"
SCRATCH=$(mktemp -d)
chmod 700 "$SCRATCH"
trap 'rm -rf "$SCRATCH"' EXIT
CALL=(run)
"do_$VERB"
