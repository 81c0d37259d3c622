#!/usr/bin/env bash
# Train with Open MPI's mpirun. mpi4py finds rank, local rank and master; tensors are sent by NCCL or gloo.
# One node; two nodes; two processes on a CPU:
#   RANKS=8 launch/mpirun.sh configs/faces_2m.yaml --data.folder FACES
#   RANKS=16 MPIRUN_OPTIONS="--hostfile hosts --map-by ppr:8:node" launch/mpirun.sh configs/faces_10m.yaml ...
#   RANKS=2 launch/mpirun.sh configs/quickstart.yaml
# Needs `pip install '.[train,mpi]'`. As root, add --allow-run-as-root to MPIRUN_OPTIONS.
# With MPICH: MPIRUN="mpirun -bind-to none", and mpi4py must find its library (set MPI4PY_LIBMPI).
set -euo pipefail
: "${RANKS:?set RANKS to the number of processes}"
exec ${MPIRUN:-mpirun --bind-to none} -n "$RANKS" ${MPIRUN_OPTIONS:-} python -m partial_fc train "$@"
