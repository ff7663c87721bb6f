#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'See a run through to its end: request the TPU, install, launch, and watch. When the TPU is taken
away it is deleted and requested again, and the run continues from its last checkpoint. Leave it running
on a machine that stays up; started again, it picks up where things are. Ends with 0 when the run is
finished, with 1 when it is given up.' \
    'PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION PROVISION CAPACITY SERVICE_ACCOUNT NETWORK
    SUBNETWORK COMMIT PYTHON_VERSION WORKDIR=gs DATA CONFIG POLL_SECONDS MAX_FAILURES DELETE_AT_END' "$@"

STUCK_POLLS=5 # looks at a run that goes on some workers only, before those are stopped

if [[ $DRY_RUN == yes ]]; then
    echo "# Every $POLL_SECONDS s, until this finds the figures that a run writes last:"
    is_finished
    echo '# the state of the TPU:'
    tpu_state
    echo '# If there is none, and after deleting it if it was taken away:'
    create_tpu
    delete_tpu
    echo '# If it is up, what its workers do:'
    worker_script status
    echo '# If that is nothing:'
    setup_workers
    launch_run
    echo '# If the run goes on some of them only:'
    worker_script stop
    if [[ $DELETE_AT_END == yes ]]; then
        echo '# In the end:'
        delete_tpu
    fi
    exit 0
fi

failures=0 stuck=0 saved=none

end() {
    if [[ $DELETE_AT_END == yes ]]; then
        delete_tpu || say 'warning: the TPU could not be deleted, and costs: tpu_scripts/delete.sh'
    elif (($1 == 1)) || [[ -n $(tpu_state) ]]; then
        say 'the TPU is still there, and costs: tpu_scripts/delete.sh'
    fi
    exit "$1"
}

# failed WHAT: count it, unless the run has saved a checkpoint since the last one; give up.
failed() {
    local now
    now=$(gcloud storage ls "$WORKDIR/checkpoints/" --project="$PROJECT" 2>/dev/null) || now=none
    if [[ $now != "$saved" ]]; then failures=0 saved=$now; fi
    failures=$((failures + 1))
    say "$1: failure $failures of $MAX_FAILURES"
    if ((failures >= MAX_FAILURES)); then
        say 'given up; the ends of the logs:'
        on_workers all "tail -n 30 $REMOTE/train.log" >&2 || true
        end 1
    fi
}

launch() {
    setup_workers || { failed 'the workers could not be set up' && return; }
    launch_run || failed 'the run could not be launched'
}

# The TPU is up: see what its workers do.
attend() {
    local found others
    if ! found=$(QUIETLY=yes worker_script status); then
        say 'the workers do not answer'
        return
    fi
    others=${found//jaxdiff-run: running/}
    if [[ $found == *running* && $others == *jaxdiff-run:* ]]; then
        # JAX ends a process that misses another one, in some minutes.
        stuck=$((stuck + 1))
        if ((stuck >= STUCK_POLLS)); then
            say 'the run goes on some workers only: stopping them'
            worker_script stop || true
            stuck=0
        fi
        return
    fi
    case $found$'\n' in
        *running*) ;;
        *'exited 2'$'\n'*)
            say 'jaxdiff refused the command; the end of the log:'
            on_workers 0 "tail -n 30 $REMOTE/train.log" >&2 || true
            end 1 ;;
        *'exited '[1-9]*)
            failed 'the run failed'
            launch ;;
        *) launch ;; # a fresh TPU, a restarted one, or a run that was told to stop and saved
    esac
    stuck=0
}

recreate() {
    failures=0 stuck=0
    delete_tpu || say 'the TPU could not be deleted'
    create_tpu || say 'no TPU now'
}

while true; do
    if QUIETLY=yes is_finished >/dev/null 2>&1; then
        say "finished: $WORKDIR"
        end 0
    fi
    if state=$(QUIETLY=yes tpu_state); then
        say "$(date -u +%FT%TZ) $TPU_NAME: ${state:-none}"
        case $state in
            ACTIVE | READY) attend ;;
            SUSPENDED | FAILED | PREEMPTED | TERMINATED | STOPPED | HIDDEN | UNKNOWN) recreate ;;
            '') create_tpu || say 'no TPU now' ;;
            *) ;; # on its way, in or out
        esac
    else
        say 'the state of the TPU is not known'
    fi
    sleep "$POLL_SECONDS"
done
