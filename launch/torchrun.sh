#!/usr/bin/env bash
# Train with torchrun and a fixed number of ranks. Any failure ends the run.
# One node with 8 GPUs; two processes on a CPU; the first of two nodes:
#   NPROC=8 launch/torchrun.sh configs/faces_2m.yaml --data.folder FACES
#   NPROC=2 launch/torchrun.sh configs/quickstart.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 NPROC=8 launch/torchrun.sh configs/faces_10m.yaml ...
# MASTER_PORT defaults to 29500.
set -euo pipefail
[[ "${NNODES:-1}" == 1 ]] || : "${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}" \
    "${NODE_RANK:?set NODE_RANK to the number of this node, from 0}"
[[ -n "${NPROC:-}" ]] || python -c 'import torch; torch.cuda.is_available() or exit("no GPU is found here: set NPROC")'
export PARTIAL_FC_LAUNCHER=$$  # exec keeps it
exec torchrun --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC:-gpu}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" -m partial_fc train "$@"
