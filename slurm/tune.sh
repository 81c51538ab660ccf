#!/bin/bash
#SBATCH --job-name=tune
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=128
#SBATCH --constraint=gpu
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
exec bash "${SWIFTV2_ROOT:-$SLURM_SUBMIT_DIR}/slurm/body.sh" tune "$@"
