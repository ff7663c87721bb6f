# Shared by the scripts of this folder, which source it. Runs on bash 3.2 (macOS) and later.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REMOTE=jaxdiff-run # the folder on a worker, in the home folder; worker.sh has the same
GS='^gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' # a bucket

say() { printf 'tpu_scripts: %s\n' "$*" >&2; }

# --- settings -------------------------------------------------------------------------------------

# Sets `default`, `pattern`, `accepted` and `about` of one setting. An empty default with `required`
# must be set; "WORKDIR=gs" is the WORKDIR of the scripts for TPUs.
describe() {
    default='' required=no
    case $1 in
        PROJECT)
            required=yes pattern='^[a-z][a-z0-9.:-]{4,61}[a-z0-9]$'
            accepted='the id of a Google Cloud project, such as my-project'
            about='The project that pays.' ;;
        ZONE)
            required=yes pattern='^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$'
            accepted='a zone, such as us-central2-b'
            about='Where the TPU is; the bucket belongs in the same region.' ;;
        TPU_NAME)
            required=yes pattern='^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$'
            accepted='a lower-case letter, then letters, digits and dashes, at most 63'
            about='Name of the TPU, and of its queued resource.' ;;
        ACCELERATOR_TYPE)
            required=yes pattern='^(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]*$'
            accepted='v2-N, v3-N, v4-N, v5p-N, v5litepod-N or v6e-N'
            about='Kind and size of the TPU. The Cloud TPU API has no TPU7x and later.' ;;
        RUNTIME_VERSION)
            pattern='^[a-z0-9][a-z0-9.-]*$' accepted='the name of a TPU runtime'
            about='Default: the one for JAX on that ACCELERATOR_TYPE.' ;;
        PROVISION)
            default=queued pattern='^(queued|direct)$' accepted='queued or direct'
            about='A queued resource, which waits for capacity, or a plain TPU VM, now or not at all.' ;;
        CAPACITY)
            default=spot pattern='^(spot|on-demand|reserved|preemptible)$'
            accepted='spot, on-demand, reserved, or, with PROVISION=direct, preemptible'
            about='What is paid for. Spot is cheap, and may be taken away; preemptible ends in a day.' ;;
        SERVICE_ACCOUNT)
            pattern='^[^@ ]+@[^@ ]+$' accepted='the e-mail address of a service account'
            about='Whose rights the workers have. Default: the project'"'"'s compute account.' ;;
        NETWORK | SUBNETWORK)
            pattern='^[A-Za-z0-9][A-Za-z0-9/._-]*$' accepted='the name of a network'
            about='Default: the project'"'"'s default one.' ;;
        WORKDIR=gs)
            required=yes pattern="$GS(/[A-Za-z0-9][A-Za-z0-9._=-]*)+\$" accepted='gs://BUCKET/FOLDER'
            about='Folder of the run. The bucket must have a hierarchical namespace.' ;;
        WORKDIR)
            required=yes pattern='^/[^[:space:]]+$' accepted='an absolute path without spaces'
            about='Folder of the run; with several nodes, on a file system they share.' ;;
        DATA)
            pattern="$GS(/[A-Za-z0-9][A-Za-z0-9._=-]*)*\$" accepted='gs://BUCKET/FOLDER'
            about="Data to copy to every worker, into ~/$REMOTE/data; runs start in ~/$REMOTE." ;;
        CONFIG)
            required=yes pattern='^[A-Za-z0-9_][A-Za-z0-9_./-]*\.py(:[A-Za-z0-9_.,=-]+)?$'
            accepted='a Python file of this repository, such as configs/digits.py'
            about='Configuration of the run; :WORD after it is its argument, as for jaxdiff train.' ;;
        COMMIT)
            default=HEAD pattern='^[A-Za-z0-9_][A-Za-z0-9._/@^~-]*$'
            accepted='a commit, branch or tag of this repository'
            about='What the workers install; uncommitted changes are not sent.' ;;
        PYTHON_VERSION)
            default=3.12 pattern='^3\.1[12]$' accepted='3.11 or 3.12'
            about='Python of the workers'"'"' virtual environment.' ;;
        WORKER)
            default=0 pattern='^(all|[0-9]+)$' accepted='the number of a worker, or all'
            about='Whose log to show.' ;;
        LINES_SHOWN)
            default=100 pattern='^[0-9]+$' accepted='a whole number'
            about='How much of the log so far to show.' ;;
        POLL_SECONDS)
            default=60 pattern='^[1-9][0-9]*$' accepted='a whole number of seconds, at least 1'
            about='How often to look.' ;;
        MAX_FAILURES)
            default=3 pattern='^[1-9][0-9]*$' accepted='a whole number, at least 1'
            about='Give up after so many failures in a row without a new checkpoint.' ;;
        DELETE_AT_END)
            default=no pattern='^(yes|no)$' accepted='yes or no'
            about='Delete the TPU when the run is finished or given up: until then it costs.' ;;
        LOCAL_DIR)
            required=yes pattern='^[^-].*$' accepted='a local folder'
            about='Where to copy the run.' ;;
        CHECKPOINTS)
            default=yes pattern='^(yes|no)$' accepted='yes or no'
            about='Whether to copy the checkpoints too.' ;;
        JAXDIFF)
            default=jaxdiff pattern='^.+$' accepted='a program'
            about='The jaxdiff command, such as /shared/venv/bin/jaxdiff; default: the one on PATH.' ;;
        GPUS)
            default=all pattern='^(all|[0-9]+(,[0-9]+)*)$' accepted='all, or numbers such as 0,1,2'
            about='Which GPUs of this machine to use.' ;;
        NODES)
            default=1 pattern='^[1-9][0-9]*$' accepted='a whole number, at least 1' about='Nodes.' ;;
        GPUS_PER_NODE)
            required=yes pattern='^[1-9][0-9]*$' accepted='a whole number, at least 1'
            about='GPUs of each node.' ;;
        TASKS)
            default=node pattern='^(node|gpu)$' accepted='node or gpu'
            about='One process a node, or one a GPU.' ;;
        CPUS_PER_TASK)
            pattern='^[1-9][0-9]*$' accepted='a whole number, at least 1'
            about='CPU cores of each process. Default: the cluster'"'"'s.' ;;
        TIME_LIMIT)
            default=24:00:00 pattern='^([0-9]+-)?[0-9]{1,2}(:[0-9]{2}){0,2}$'
            accepted='[DAYS-]HOURS:MINUTES:SECONDS'
            about='Of one job; the run goes on in the next one.' ;;
        GRACE_SECONDS)
            default=120 pattern='^[1-9][0-9]*$' accepted='a whole number of seconds, at least 1'
            about='How long before the time limit the run is told to save and stop.' ;;
        PARTITION | ACCOUNT)
            pattern='^[A-Za-z0-9_][A-Za-z0-9_,.-]*$' accepted='a name of the cluster'
            about='Default: the cluster'"'"'s.' ;;
        *) say "no such setting: $1" && exit 70 ;;
    esac
}

show_help() {
    local setting more=''
    [[ " $2 " == *' CONFIG '* ]] && more=' [-- ARGUMENTS of jaxdiff train]'
    printf 'Usage: NAME=VALUE ... tpu_scripts/%s [--dry-run] [--help]%s\n\n%s\n\n' \
        "$(basename "$0")" "$more" "$1"
    printf -- '--dry-run prints the commands and runs none. Settings, by the environment:\n\n'
    for setting in $2; do
        describe "$setting"
        printf '  %-17s %s\n' "${setting%%=*}" "$about"
        printf '  %-17s Accepted: %s.' '' "$accepted"
        [[ $required == yes ]] && printf ' Required.'
        [[ -n $default ]] && printf ' Default: %s.' "$default"
        printf '\n'
    done
}

# begin ABOUT "SETTINGS" "$@": reads the arguments, checks the settings, or exits with 2.
begin() {
    local setting about_script=$1 settings=$2
    shift 2
    DRY_RUN=no ARGUMENTS=()
    while (($#)); do
        case $1 in
            --help | -h) show_help "$about_script" "$settings" && exit 0 ;;
            --dry-run) DRY_RUN=yes ;;
            --)
                [[ " $settings " == *' CONFIG '* ]] || wrong "this script takes no arguments after --"
                shift && ARGUMENTS=("$@") && break ;;
            *) wrong "arguments are --dry-run and --help, got '$1'" ;;
        esac
        shift
    done
    ERRORS=0
    for setting in $settings; do check "$setting"; done
    ((ERRORS == 0)) || exit 2
    check_together
    ((ERRORS == 0)) || exit 2
}

wrong() { say "error: $*" && exit 2; }

error() { say "error: $*" && ERRORS=$((ERRORS + 1)); }

check() {
    local default required pattern accepted about name=${1%%=*}
    describe "$1"
    local value=${!name:-$default}
    if [[ -z $value ]]; then
        [[ $required == no ]] || error "$name is not set: it must be $accepted"
    elif [[ ! $value =~ $pattern ]]; then
        error "$name must be $accepted, got '$value'"
    fi
    printf -v "$name" %s "$value"
}

# What depends on several settings, or on files.
check_together() {
    if [[ ${CAPACITY:-} == preemptible && $PROVISION == queued ]]; then
        error "CAPACITY must be spot, on-demand or reserved with PROVISION=queued, got 'preemptible'"
    fi
    if [[ -n ${ACCELERATOR_TYPE:-} && -z ${RUNTIME_VERSION:-} ]]; then
        case $ACCELERATOR_TYPE in
            v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
            v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
            v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
            *) RUNTIME_VERSION=tpu-ubuntu2204-base ;;
        esac
    fi
    if [[ -n ${CONFIG:-} && ! -f $ROOT/${CONFIG%%:*} ]]; then
        error "CONFIG must be $(describe CONFIG && printf %s "$accepted"), got '$CONFIG'"
    fi
    if [[ -n ${COMMIT:-} ]]; then
        local given=$COMMIT
        if ! COMMIT=$(git -C "$ROOT" rev-parse --verify --quiet "$given^{commit}"); then
            error "COMMIT must be $(describe COMMIT && printf %s "$accepted"), got '$given'"
        elif [[ -n ${CONFIG:-} ]] &&
            ! git -C "$ROOT" cat-file -e "$COMMIT:${CONFIG%%:*}" 2>/dev/null; then
            error "CONFIG must be a file of COMMIT $given, got '$CONFIG'"
        fi
    fi
    if [[ -n ${JAXDIFF:-} ]]; then
        local program=$JAXDIFF
        JAXDIFF=$(type -P "$program") || error "JAXDIFF must be a program, got '$program'"
        [[ $JAXDIFF == /* ]] || JAXDIFF=$PWD/$JAXDIFF
    fi
}

# --- commands -------------------------------------------------------------------------------------

# The arguments as one line for a shell.
quoted() {
    local word line='' quote="'\\''"
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then word="'${word//\'/$quote}'"; fi
        line+="${line:+ }$word"
    done
    printf %s "$line"
}

# Runs a command and, unless QUIETLY=yes, says so; with --dry-run prints it.
run() {
    if [[ $DRY_RUN == yes ]]; then
        printf '%s\n' "$(quoted "$@")"
    else
        [[ ${QUIETLY:-no} == yes ]] || say "+ $(quoted "$@")"
        "$@"
    fi
}

# --- TPUs -----------------------------------------------------------------------------------------

tpu() { run gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }

# on_workers WHICH COMMAND: a line for the shell of one worker, or of all.
on_workers() { tpu tpu-vm ssh "$TPU_NAME" --worker="$1" --quiet --command="$2"; }

worker_script() { on_workers all "$(quoted bash "$REMOTE/repo/tpu_scripts/worker.sh" "$@")"; }

create_tpu() {
    local options=(--accelerator-type="$ACCELERATOR_TYPE")
    [[ $CAPACITY == on-demand ]] || options+=("--$CAPACITY")
    [[ -z $SERVICE_ACCOUNT ]] || options+=(--service-account="$SERVICE_ACCOUNT")
    [[ -z $NETWORK ]] || options+=(--network="$NETWORK")
    [[ -z $SUBNETWORK ]] || options+=(--subnetwork="$SUBNETWORK")
    options+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
    if [[ $PROVISION == queued ]]; then
        tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
            --runtime-version="$RUNTIME_VERSION" "${options[@]}"
    else
        tpu tpu-vm create "$TPU_NAME" --version="$RUNTIME_VERSION" "${options[@]}"
    fi
}

delete_tpu() {
    if [[ $PROVISION == queued ]]; then
        tpu queued-resources delete "$TPU_NAME" --force --quiet
    else
        tpu tpu-vm delete "$TPU_NAME" --quiet
    fi
}

# Prints the state of the queued resource or of the TPU VM; nothing if there is none.
tpu_state() {
    local kind=tpu-vm field=state
    if [[ $PROVISION == queued ]]; then kind=queued-resources field=state.state; fi
    tpu "$kind" list --filter="name~/$TPU_NAME\$" --format="value($field)"
}

setup_workers() {
    local short=${COMMIT:0:12} archive folder
    archive=${TMPDIR:-/tmp}/jaxdiff-$short.tar.gz
    folder=$REMOTE/$short # each commit has its own: a run that still goes keeps its files
    run git -C "$ROOT" archive --format=tar.gz --output="$archive" "$COMMIT" \
        jaxdiff configs tpu_scripts pyproject.toml constraints.txt README.md LICENSE &&
        tpu tpu-vm scp "$archive" "$TPU_NAME:" --worker=all --quiet &&
        on_workers all "mkdir -p $folder && tar -xzf jaxdiff-$short.tar.gz -C $folder && $(quoted \
            bash "$folder/tpu_scripts/worker.sh" setup "$PYTHON_VERSION" "$WORKDIR" ${DATA:+"$DATA"})"
}

launch_run() { worker_script start "$WORKDIR" "$CONFIG" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}; }

# Whether the run has its final figures, which jaxdiff writes last.
is_finished() { run gcloud storage ls "$WORKDIR/metrics.json" --project="$PROJECT"; }
