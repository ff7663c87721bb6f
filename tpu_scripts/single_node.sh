#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Start, or continue, a run on the GPUs of this machine, in the foreground: one process has them
all. Ctrl-C saves and stops.' 'WORKDIR CONFIG JAXDIFF GPUS' "$@"

command=("$JAXDIFF" train --config "$ROOT/$CONFIG" --workdir "$WORKDIR")
[[ $GPUS == all ]] || command=(env CUDA_VISIBLE_DEVICES="$GPUS" "${command[@]}")
command+=(${ARGUMENTS[@]+"${ARGUMENTS[@]}"})
if [[ $DRY_RUN == yes ]]; then
    run "${command[@]}"
else
    exec "${command[@]}" # so that signals reach the run
fi
