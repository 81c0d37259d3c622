#!/usr/bin/env bash
# Train on a Ray cluster with Ray Train: one rank per worker, started again after a failure. The run resumes from its
# newest checkpoint, also with another number of workers. Two CPU workers; 8 GPUs; as many of 16 GPUs as there are:
#   WORKERS=2 launch/ray.sh configs/quickstart.yaml
#   WORKERS=8 RAY_OPTIONS="--gpus 1 --cpus 8" launch/ray.sh configs/faces_2m.yaml --data.folder FACES
#   WORKERS=8:16 RAY_OPTIONS="--gpus 1 --address auto" launch/ray.sh configs/faces_10m.yaml --train.checkpoint_steps 1000
# Needs `pip install '.[train,ray]'` on all nodes, and folders that all nodes share. RAY_OPTIONS: see
# `python -m partial_fc.engines.ray --help`.
set -euo pipefail
: "${WORKERS:?set WORKERS to the number of processes}"
exec python -m partial_fc.engines.ray --workers "$WORKERS" ${RAY_OPTIONS:-} -m partial_fc train "$@" --start_or_resume
