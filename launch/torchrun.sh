#!/usr/bin/env bash
# By torchrun, with a fixed number of ranks; any failure ends the run.
#   NPROC=8 launch/torchrun.sh configs/faces_2m.yaml --data.folder FACES                             one node with 8 GPUs
#   NPROC=2 launch/torchrun.sh configs/quickstart.yaml                                               two processes on a CPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 NPROC=8 launch/torchrun.sh configs/faces_10m.yaml ...  on the first of two nodes
# MASTER_PORT is 29500 if not given.
set -euo pipefail
exec torchrun --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC:-gpu}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" -m partial_fc train "$@"
