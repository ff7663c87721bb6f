#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Follow the log of a run on one worker, or all, and its metrics; Ctrl-C ends this, not the run.' \
    'PROJECT ZONE TPU_NAME WORKDIR=gs WORKER LINES_SHOWN' "$@"
on_workers "$WORKER" "tail -n $LINES_SHOWN -F $REMOTE/train.log \
$REMOTE/buckets/${WORKDIR#gs://}/metrics.jsonl"
