#!/usr/bin/env bash
# Train on one node with Accelerate. The first file sets the number of processes, and DeepSpeed ZeRO or FSDP2 for the
# backbone:
#   launch/accelerate.sh configs/accelerate/cpu2.yaml configs/quickstart.yaml
#   launch/accelerate.sh configs/accelerate/gpu8.yaml configs/faces_2m.yaml --data.folder FACES
#   launch/accelerate.sh configs/accelerate/zero2.yaml configs/faces_2m.yaml --data.folder FACES
#   (or zero3.yaml, fsdp2.yaml)
# Needs `pip install '.[train]'`, for ZeRO also '.[deepspeed]'. Settings may follow the run's file.
set -euo pipefail
export PARTIAL_FC_LAUNCHER=$$  # exec keeps it
exec accelerate launch --config_file "${1:?name its file, then that of the run; see the top of this file}" \
    -m partial_fc train "${@:2}"
