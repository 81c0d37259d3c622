#!/usr/bin/env bash
# Train on several nodes with Accelerate. Run it on each node, with the node's number and the address of the first node:
#   export MACHINE_RANK=0 MASTER_ADDR=10.0.0.1    (on the second node MACHINE_RANK=1, and the same address)
#   launch/accelerate_nodes.sh configs/accelerate/two_nodes.yaml configs/faces_10m.yaml --data.folder FACES
# MASTER_PORT (default 29500) must be open on the first node. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME select the
# network interface.
set -euo pipefail
: "${MACHINE_RANK:?set MACHINE_RANK to the number of this node, from 0}"
: "${MASTER_ADDR:?set MASTER_ADDR to the address of node 0}"
export PARTIAL_FC_LAUNCHER=$$  # exec keeps it
exec accelerate launch --config_file "${1:?name its file, then that of the run; see the top of this file}" \
    --machine_rank "$MACHINE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}" \
    -m partial_fc train "${@:2}"
