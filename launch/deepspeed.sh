#!/usr/bin/env bash
# By DeepSpeed's launcher. The first file is DeepSpeed's own configuration (configs/deepspeed/), which takes the backbone; the head stays beside it.
#   launch/deepspeed.sh configs/deepspeed/zero2_bf16.json configs/faces_2m.yaml --data.folder FACES
#   DEEPSPEED_OPTIONS="--hostfile hosts" launch/deepspeed.sh configs/deepspeed/zero3_bf16.json configs/faces_10m.yaml ...  several nodes
# In an environment with `pip install '.[train,deepspeed]'`.
set -euo pipefail
export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE="$1"
exec deepspeed ${DEEPSPEED_OPTIONS:-} --no_local_rank --module partial_fc train "${@:2}"
