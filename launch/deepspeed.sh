#!/usr/bin/env bash
# By DeepSpeed's launcher. The first file is DeepSpeed's configuration for the backbone; the head stays beside it.
#   launch/deepspeed.sh configs/deepspeed/zero2.json configs/faces_2m.yaml --data.folder FACES                                   one node
#   DEEPSPEED_OPTIONS="--hostfile hosts" launch/deepspeed.sh configs/deepspeed/zero3.json configs/faces_10m.yaml ...  several nodes
# In an environment with `pip install '.[train,deepspeed]'`. The run's file says the precision (train.mixed_precision).
set -euo pipefail
exec deepspeed ${DEEPSPEED_OPTIONS:-} --no_local_rank --module partial_fc train "${@:2}" --train.deepspeed "$1"
