#!/usr/bin/env bash
# One node, by Accelerate; the first file says how many processes, and whether DeepSpeed ZeRO or FSDP2 takes the backbone:
#   launch/accelerate.sh configs/accelerate/cpu2.yaml configs/quickstart.yaml
#   launch/accelerate.sh configs/accelerate/gpu8.yaml configs/faces_2m.yaml --data.folder FACES
#   launch/accelerate.sh configs/accelerate/zero2.yaml configs/faces_2m.yaml --data.folder FACES    (zero3.yaml, fsdp2.yaml)
# In an environment with `pip install '.[train]'`, and for ZeRO '.[deepspeed]'; settings of the run follow its file.
set -euo pipefail
exec accelerate launch --config_file "$1" -m partial_fc train "${@:2}"
