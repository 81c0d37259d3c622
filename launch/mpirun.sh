#!/usr/bin/env bash
# By Open MPI's mpirun; mpi4py finds rank, local rank and master, the tensors go over NCCL or gloo.
#   RANKS=8 launch/mpirun.sh configs/faces_2m.yaml --data.folder FACES                                         one node
#   RANKS=16 MPIRUN_OPTIONS="--hostfile hosts --map-by ppr:8:node" launch/mpirun.sh configs/faces_10m.yaml ... two
#   RANKS=2 launch/mpirun.sh configs/quickstart.yaml                                                           two processes on a CPU
# In an environment with `pip install '.[train,mpi]'`. As root, MPIRUN_OPTIONS needs --allow-run-as-root.
# With MPICH: MPIRUN="mpirun -bind-to none", and mpi4py must find its library (MPI4PY_LIBMPI names it).
set -euo pipefail
exec ${MPIRUN:-mpirun --bind-to none} -n "$RANKS" ${MPIRUN_OPTIONS:-} python -m partial_fc train "$@"
