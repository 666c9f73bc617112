#!/bin/bash
# Two machines with eight accelerators each: sbatch slurm.sh run.yaml
# `output_dir` and `dataset_prepared_path` must be on a file system that both see.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
# SIGTERM two minutes before the time is up: eft saves a full checkpoint and stops; submit again to continue.
#SBATCH --signal=TERM@120

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The data once, before the processes start.
eft preprocess "$1"
exec srun --kill-on-bad-exit=1 eft train "$1" \
  --nproc "$SLURM_GPUS_ON_NODE" --nnodes "$SLURM_NNODES" --rendezvous "$first:29500" --max-restarts 3
