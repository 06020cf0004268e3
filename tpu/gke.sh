#!/usr/bin/env bash
# Trains on GKE's TPUs with a JobSet (jobset.yaml), which starts all hosts, and starts them again when one is lost.
#
#   tpu/gke.sh VERB --name NAME [OPTIONS] [-- JAX-IT OPTIONS]
#
# Verbs:
#   run      apply, then watch, or only watch if it already exists. Exit code: 0 done; 1 a bug in jax_it; 2 for
#            you to fix; 75 gave up
#   render   print the JobSet          apply    hand it to the cluster
#   watch    until the run ends        status   the JobSet and its pods
#   logs     of the first host         delete   the JobSet and its pods
#
# Options:
#   --name NAME             of the JobSet
#   --context, --namespace  of kubectl (default: its current ones)
#   --type v4|v5e|v5p|v6e   which TPU   [render, apply, run, with the options below]
#   --topology AxB[xC]      chips of a slice: 4x4, 2x2x4, ...
#   --slices N              (default: 1)
#   --chips-per-host N      (default: 4, or all of a smaller slice; 8: machines that end in -8t)
#   --image IMAGE           built from tpu/Dockerfile with EXTRA=tpu
#   --config NAME[:ARG]     a recipe, or FILE[:ARG] in the image
#   --workdir URL           gs://BUCKET/RUN
#   --cache URL             XLA's compiled programs (default: jax_cache beside the workdir); none: no cache
#   --spot                  nodes that are spot
#   --service-account NAME  of Kubernetes, which may write to the bucket
#   --secret NAME           a Secret whose keys become environment variables (HF_TOKEN, WANDB_API_KEY)
#   --env NAME=VALUE        for the run's environment; may be repeated
#   --max-restarts N        (default: 100)
#   --poll SECONDS          between looks (default: 60)
#   --lines N, --follow     of `logs`
#   --dry-run               print every command, run none
#
# Each option can be set in the environment too: JAX_IT_TYPE, JAX_IT_TOPOLOGY, ...
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$HERE/common.sh"

PATIENCE=10 # looks that kubectl may fail one after the other

options() {
    VERB=${1:-}
    case $VERB in
        -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
        run | render | apply | watch | status | logs | delete) shift ;;
        "") fail "a verb is missing: run, render, apply, watch, status, logs, delete" ;;
        *) fail "unknown verb $VERB; see $PROGRAM --help" ;;
    esac
    NAME=${JAX_IT_NAME:-} CONTEXT=${JAX_IT_CONTEXT:-} NAMESPACE=${JAX_IT_NAMESPACE:-} TYPE=${JAX_IT_TYPE:-}
    TOPOLOGY=${JAX_IT_TOPOLOGY:-} SLICES=${JAX_IT_SLICES:-1} CHIPS=${JAX_IT_CHIPS_PER_HOST:-} IMAGE=${JAX_IT_IMAGE:-}
    CONFIG=${JAX_IT_CONFIG:-} WORKDIR=${JAX_IT_WORKDIR:-} CACHE=${JAX_IT_CACHE:-} SPOT=${JAX_IT_SPOT:-}
    SERVICE_ACCOUNT=${JAX_IT_SERVICE_ACCOUNT:-} SECRET=${JAX_IT_SECRET:-} MAX_RESTARTS=${JAX_IT_MAX_RESTARTS:-100}
    POLL=${JAX_IT_POLL:-60} TAIL=${JAX_IT_LINES:-100} FOLLOW="" ENVIRONMENT_WORDS=() ARGUMENTS=()
    local option value
    while (($#)); do
        option=$1 value=""
        shift
        case $option in
            --) ARGUMENTS=("$@") && break ;;
            -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
            --spot) SPOT=1 && continue ;;
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
            --name) NAME=$value ;; --context) CONTEXT=$value ;; --namespace) NAMESPACE=$value ;; --type) TYPE=$value ;;
            --topology) TOPOLOGY=$value ;; --slices) SLICES=$value ;; --chips-per-host) CHIPS=$value ;;
            --image) IMAGE=$value ;; --config) CONFIG=$value ;; --workdir) WORKDIR=$value ;; --cache) CACHE=$value ;;
            --service-account) SERVICE_ACCOUNT=$value ;; --secret) SECRET=$value ;;
            --env) ENVIRONMENT_WORDS+=("$value") ;; --max-restarts) MAX_RESTARTS=$value ;; --poll) POLL=$value ;;
            --lines) TAIL=$value ;;
            *) fail "unknown option $option; see $PROGRAM --help" ;;
        esac
    done
    check_options
}

check_options() {
    local chips name
    need "$NAME" --name
    # a pod is NAME-slice-J-H, and the host's name of at most 63 letters has five more
    [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        fail "--name=$NAME: lower-case letters, digits and hyphens, a letter first, at most 40"
    need_number "$POLL" --poll 0
    need_number "$TAIL" --lines 1
    [[ $VERB == render ]] || need_program kubectl
    case $VERB in
        run | render | apply) ;;
        *) return 0 ;;
    esac
    need_number "$MAX_RESTARTS" --max-restarts 0
    need_number "$SLICES" --slices 1
    need "$TYPE" --type
    need "$TOPOLOGY" --topology
    need "$IMAGE" --image
    need "$CONFIG" --config
    need "$WORKDIR" --workdir
    [[ $WORKDIR == *://* ]] || fail "--workdir=$WORKDIR: a pod's disk dies with it; name a bucket, as gs://BUCKET/RUN"
    case $TYPE in
        v4) ACCELERATOR=tpu-v4-podslice ;;
        v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
        v5p) ACCELERATOR=tpu-v5p-slice ;;
        v6e) ACCELERATOR=tpu-v6e-slice ;;
        *) fail "--type=$TYPE: v4, v5e, v5p or v6e is needed" ;;
    esac
    case $TYPE in
        v5e | v6e)
            [[ $TOPOLOGY =~ ^([0-9]+)x([0-9]+)$ ]] || fail "--topology=$TOPOLOGY: a $TYPE slice has two sides, as 4x4"
            chips=$((BASH_REMATCH[1] * BASH_REMATCH[2]))
            ;;
        *)
            [[ $TOPOLOGY =~ ^([0-9]+)x([0-9]+)x([0-9]+)$ ]] ||
                fail "--topology=$TOPOLOGY: a $TYPE slice has three sides, as 2x2x4"
            chips=$((BASH_REMATCH[1] * BASH_REMATCH[2] * BASH_REMATCH[3]))
            ;;
    esac
    CHIPS=${CHIPS:-$((chips < 4 ? chips : 4))}
    need_number "$CHIPS" --chips-per-host 1
    ((chips && chips % CHIPS == 0)) || fail "--topology=$TOPOLOGY: $chips chips are not a multiple of $CHIPS a host"
    HOSTS=$((chips / CHIPS))
    ((SLICES == 1 || HOSTS > 1)) || fail "--slices=$SLICES: GKE joins only slices of several hosts; $TOPOLOGY has one"
    for name in "${ENVIRONMENT_WORDS[@]}"; do
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=${name%%=*}: NAME=VALUE is needed"
    done
}

# Text as a JSON string, which YAML reads as it is.
json() {
    local text=$1
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    # Kubernetes replaces $(NAME) in commands and values; $$ stands for $
    printf '"%s"' "${text//\$(/\$\$(}"
}

json_list() {
    local word separator=""
    printf '['
    for word in "$@"; do
        printf '%s%s' "$separator" "$(json "$word")"
        separator=", "
    done
    printf ']'
}

environment() {
    local name separator="" cache
    cache=$(cache_folder "$WORKDIR" "$CACHE")
    printf '['
    for name in ${cache:+"JAX_COMPILATION_CACHE_DIR=$cache"} "${ENVIRONMENT_WORDS[@]}"; do
        printf '%s{"name": "%s", "value": %s}' "$separator" "${name%%=*}" "$(json "${name#*=}")"
        separator=", "
    done
    printf ']'
}

do_render() {
    local line name value block="" command env
    command=$(json_list jax-it train --config "$CONFIG" --workdir "$WORKDIR" "${ARGUMENTS[@]}")
    env=$(environment)
    while IFS= read -r line; do
        if [[ $line =~ ^\ *#\ only\ ([a-z]+)$ ]]; then
            block=${BASH_REMATCH[1]}
        elif [[ $line =~ ^\ *#\ end$ ]]; then
            block=""
        elif [[ $block == slices ]] && ((SLICES == 1)); then
            continue
        elif [[ ($block == spot && ! $SPOT) || ($block == account && ! $SERVICE_ACCOUNT) ||
            ($block == secret && ! $SECRET) || $line == \#* ]]; then
            continue
        else
            if [[ $line =~ ^([^$]*)\$\{([A-Z_]+)\}(.*)$ ]]; then
                name=${BASH_REMATCH[2]}
                case $name in
                    COMMAND) value=$command ;;
                    ENVIRONMENT) value=$env ;;
                    ACCELERATOR) value=$ACCELERATOR ;;
                    CHIPS | HOSTS | SLICES | MAX_RESTARTS) value=${!name} ;;
                    *) value=$(json "${!name}") ;;
                esac
                line=${BASH_REMATCH[1]}$value${BASH_REMATCH[3]}
            fi
            printf '%s\n' "$line"
        fi
    done <"$HERE/jobset.yaml"
}

kube() {
    "${CALL[@]}" kubectl ${CONTEXT:+"--context=$CONTEXT"} ${NAMESPACE:+"--namespace=$NAMESPACE"} "$@"
}
CALL=(run)

do_apply() {
    if [[ $DRY_RUN ]]; then
        do_render
    fi
    # create, not apply: a JobSet of this name that has ended would stay as it is
    kube create -f - < <(do_render) || fail "the JobSet could not be created; kubectl's reason is above"
}

PODS="jobset.sigs.k8s.io/jobset-name"

do_watch() {
    local CALL=() state restarts codes failed=0
    if [[ $DRY_RUN ]]; then
        CALL=(run)
        kube get jobset "$NAME" "--output=jsonpath={.status.terminalState} {.status.restarts}"
        return
    fi
    while :; do
        if ! state=$(kube get jobset "$NAME" "--output=jsonpath={.status.terminalState} {.status.restarts}" 2>&1); then
            [[ $state != *NotFound* ]] || fail "no JobSet is named $NAME"
            ((++failed < PATIENCE)) || fail "kubectl does not answer: $(tail -n 1 <<<"$state")"
            state=" "
        else
            failed=0
        fi
        restarts=${state#* }
        case ${state%% *} in
            Completed)
                say "$NAME: completed after ${restarts:-0} restarts"
                return 0
                ;;
            Failed)
                codes=$(kube get pods "--selector=$PODS=$NAME" \
                    "--output=jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}") || codes=""
                say "$NAME: failed after ${restarts:-0} restarts; exit codes: ${codes:-unknown}"
                # Pods that were killed because another one had failed say nothing.
                # shellcheck disable=SC2086 # a list of numbers
                codes=$(verdict ${codes//137/})
                ((codes)) || codes=75 # failed, and no pod is left to say how
                return "$codes"
                ;;
            *) say "$NAME: running, ${restarts:-0} restarts" ;;
        esac
        sleep "$POLL"
    done
}

do_status() {
    kube get jobset "$NAME"
    kube get pods "--selector=$PODS=$NAME" --output=wide
}

do_logs() {
    kube logs "--selector=$PODS=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" \
        --container=jax-it "--tail=$TAIL" ${FOLLOW:+--follow}
}

do_delete() {
    kube delete jobset "$NAME" --ignore-not-found
}

do_run() {
    if [[ ! $DRY_RUN ]] && kubectl ${CONTEXT:+"--context=$CONTEXT"} ${NAMESPACE:+"--namespace=$NAMESPACE"} \
        get jobset "$NAME" >/dev/null 2>&1; then
        say "$NAME already exists: watching it"
    else
        do_apply
    fi
    do_watch
}

options "$@"
"do_$VERB"
