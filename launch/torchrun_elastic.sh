#!/usr/bin/env bash
# Train with torchrun, restarted after a failure up to MAX_RESTARTS times. The run resumes from its newest checkpoint,
# also with fewer nodes. One node; two nodes, with the same command on each:
#   NPROC=8 launch/torchrun_elastic.sh configs/faces_2m.yaml --data.folder FACES --train.checkpoint_steps 1000
#   NNODES=1:2 RDZV_ENDPOINT=10.0.0.1:29400 NPROC=8 launch/torchrun_elastic.sh configs/faces_10m.yaml ...
# TORCH_DISABLE_SHARE_RDZV_TCP_STORE makes a new store for every restart; with the shared store, restarts sometimes hung
# (torch 2.13).
set -euo pipefail
[[ "${NNODES:-1}" == 1 ]] || : "${RDZV_ENDPOINT:?set RDZV_ENDPOINT to address:port of one node; without it each trains alone}"
[[ -n "${NPROC:-}" ]] || python -c 'import torch; torch.cuda.is_available() or exit("no GPU is found here: set NPROC")'
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PARTIAL_FC_LAUNCHER=$$  # exec keeps it
exec torchrun --nnodes "${NNODES:-1}" --nproc_per_node "${NPROC:-gpu}" --max_restarts "${MAX_RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_id "${RDZV_ID:-partial_fc}" --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" \
    -m partial_fc train "$@" --start_or_resume
