#!/usr/bin/env bash
# The job that slurm.sh submits: slurm_job.sh JAXDIFF CONFIG WORKDIR [ARGUMENTS of jaxdiff train]
set -euo pipefail

jaxdiff=$1 config=$2 workdir=$3
shift 3

# JAX gives each task of Slurm the one GPU that has the task's local number, which is right for a task
# a GPU, as every task sees all GPUs of its node; a task that has the node to itself takes them all.
if [[ $SLURM_NTASKS_PER_NODE == 1 ]]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
    export JAX_LOCAL_DEVICE_IDS
fi
# The processes find each other by host name, and a proxy would be asked for it.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY

options=(--kill-on-bad-exit=1 --gpu-bind=none)
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
code=0
srun "${options[@]}" "$jaxdiff" train --config "$config" --workdir "$workdir" --quiet "$@" || code=$?

if [[ -f $workdir/metrics.json ]]; then
    echo "finished: $workdir"
elif ((code == 0 || code == 143)); then # 143: told to stop before it had begun
    echo 'saved and stopped: queued again'
    scontrol requeue "$SLURM_JOB_ID"
else
    exit "$code"
fi
