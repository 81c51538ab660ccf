#!/bin/bash
#SBATCH --job-name=pretrain_3.2B
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --constraint=gpu&hbm80g
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
exec bash "${SWIFTV2_ROOT:-$SLURM_SUBMIT_DIR}/slurm/body.sh" pretrain 3.2B "$@"
