#!/usr/bin/env bash
# Several nodes, by Accelerate: the same on each, which says who it is and where the first one is.
#   MACHINE_RANK=0 MASTER_ADDR=10.0.0.1 launch/accelerate_nodes.sh configs/accelerate/two_nodes.yaml configs/faces_10m.yaml ...
#   MACHINE_RANK=1 MASTER_ADDR=10.0.0.1 launch/accelerate_nodes.sh configs/accelerate/two_nodes.yaml configs/faces_10m.yaml ...
# MASTER_PORT (29500 if not given) must be open on the first node; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between them.
set -euo pipefail
exec accelerate launch --config_file "$1" --machine_rank "$MACHINE_RANK" --main_process_ip "$MASTER_ADDR" \
    --main_process_port "${MASTER_PORT:-29500}" -m partial_fc train "${@:2}"
