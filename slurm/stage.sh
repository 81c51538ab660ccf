#!/bin/bash
# One task a node: unpack the Python packages where every rank of the node reads them without the shared file system.
set -eu
folder=${SWIFTV2_NODE_LOCAL:-/tmp}/swiftv2-$SLURM_JOB_ID/${SLURMD_NODENAME:-node}
rm -rf "$folder/packages"
mkdir -p "$folder/packages"
tar --extract --file "$SWIFTV2_PACKAGES" --directory "$folder/packages"
