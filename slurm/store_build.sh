#!/bin/bash
#SBATCH --job-name=store_build
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=64
#SBATCH --cpus-per-task=2
#SBATCH --constraint=cpu
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
exec bash "${SWIFTV2_ROOT:-$SLURM_SUBMIT_DIR}/slurm/body.sh" store build "$@"
