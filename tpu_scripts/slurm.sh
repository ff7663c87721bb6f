#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Submit a run to Slurm, with one process a node or one a GPU. Before the time limit, and when the
job is preempted, the run saves; the job is queued again until the run is finished. The log is
WORKDIR.log.' \
    'WORKDIR CONFIG JAXDIFF NODES GPUS_PER_NODE TASKS CPUS_PER_TASK TIME_LIMIT GRACE_SECONDS PARTITION
    ACCOUNT' "$@"

per_node=1
[[ $TASKS == node ]] || per_node=$GPUS_PER_NODE
# The signal goes to the processes of the run, not to the script of the job.
options=(--job-name="$(basename "$WORKDIR")" --nodes="$NODES" --ntasks-per-node="$per_node"
    --gpus-per-node="$GPUS_PER_NODE" --time="$TIME_LIMIT" --signal="TERM@$GRACE_SECONDS" --requeue
    --open-mode=append --output="$WORKDIR.log")
[[ -z $CPUS_PER_TASK ]] || options+=(--cpus-per-task="$CPUS_PER_TASK")
[[ -z $PARTITION ]] || options+=(--partition="$PARTITION")
[[ -z $ACCOUNT ]] || options+=(--account="$ACCOUNT")
run sbatch "${options[@]}" "$ROOT/tpu_scripts/slurm_job.sh" \
    "$JAXDIFF" "$ROOT/$CONFIG" "$WORKDIR" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
