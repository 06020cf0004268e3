# shellcheck shell=bash
# What the scripts of this folder share. They source it; it does nothing by itself.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
    echo "$(basename "$0"): bash 4.4 or newer is needed, this is $BASH_VERSION" >&2
    exit 2
fi

PROGRAM=$(basename "$0")
DRY_RUN=${DRY_RUN:-}

# The user can fix it: one line and exit code 2.
fail() {
    echo "$PROGRAM: $*" >&2
    exit 2
}

say() {
    echo "$(date +%H:%M:%S) $*" >&2
}

# The words in one line, quoted so that a shell reads the same words back.
quoted() {
    local word separator=""
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            printf '%s%s' "$separator" "$word"
        else
            printf '%s%s' "$separator" "${word@Q}"
        fi
        separator=" "
    done
    printf '\n'
}

# Runs a command that changes something, after showing it; --dry-run only shows it.
run() {
    if [[ $DRY_RUN ]]; then
        quoted "$@"
    else
        echo "+ $(quoted "$@")" >&2
        "$@"
    fi
}

# need VALUE OPTION: an option that has no default
need() {
    [[ $1 ]] || fail "$2 is missing; see $PROGRAM --help"
}

# need_number VALUE OPTION LEAST
need_number() {
    if [[ ! $1 =~ ^[0-9]{1,9}$ ]] || ((10#$1 < $3)); then
        fail "$2=$1: a whole number of at least $3 is needed"
    fi
}

need_program() {
    [[ $DRY_RUN ]] || command -v "$1" >/dev/null || fail "$1 is not installed, or not on PATH"
}

# The text that stands at the head of a script, as its help.
show_help() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}

# A run's exit code from those of its processes: 0 done, 2 the user must fix it, 1 a bug in jax_it, 75 start again.
# Where one process was killed, another one's 1 may only say that it lost its peer.
verdict() {
    local code result=0
    for code in "$@"; do
        [[ $code == 2 ]] && echo 2 && return
        [[ $code == 0 ]] || result=75
    done
    if [[ " $* " != *" 137 "* && " $* " == *" 1 "* ]]; then
        result=1
    fi
    echo "$result"
}

# The file of a config without its argument, FILE[:ARG]; nothing for a recipe's name, NAME[:ARG]
config_file() {
    local file=${1%%:*}
    [[ $file != */* && $file != *.py ]] || echo "$file"
}

# Where XLA keeps compiled programs: beside the run directory unless said otherwise, so that runs share it.
cache_folder() {
    local workdir=${1%/} cache=$2
    if [[ $cache == none ]]; then
        echo ""
    else
        echo "${cache:-${workdir%/*}/jax_cache}"
    fi
}
