#!/bin/bash
# One task of a step: what must be set before Python starts.
set -eu
folder=${SWIFTV2_NODE_LOCAL:-/tmp}/swiftv2-$SLURM_JOB_ID/${SLURMD_NODENAME:-node}
cache=$folder/rank-$SLURM_LOCALID
mkdir -p "$cache"
# Ranks that compile into one folder wait for, or read, one another's half-written files.
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions
[ -z "${SWIFTV2_PACKAGES:-}" ] || export PYTHONPATH=$folder/packages${PYTHONPATH:+:$PYTHONPATH}  # of this node
[ -z "${SWIFTV2_GPU_ORDER:-}" ] || export CUDA_VISIBLE_DEVICES=$SWIFTV2_GPU_ORDER
exec "$@"
