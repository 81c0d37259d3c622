#!/usr/bin/env bash
# Train with DeepSpeed's launcher. The first file is DeepSpeed's configuration for the backbone; it does not apply to
# the head.
#   launch/deepspeed.sh configs/deepspeed/zero2.json configs/faces_2m.yaml --data.folder FACES
# On several nodes:
#   DEEPSPEED_OPTIONS="--hostfile hosts" launch/deepspeed.sh configs/deepspeed/zero3.json configs/faces_10m.yaml ...
# Needs `pip install '.[train,deepspeed]'`. The precision is set in the run's file (train.mixed_precision).
set -euo pipefail
exec deepspeed ${DEEPSPEED_OPTIONS:-} --no_local_rank --module partial_fc train "${@:2}" \
    --train.deepspeed "${1:?name its file, then that of the run; see the top of this file}"
