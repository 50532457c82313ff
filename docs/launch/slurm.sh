#!/bin/bash
# Mixtral 8x7B on 8 hosts of 8 H100s: sbatch --array=1-14%1 docs/launch/slurm.sh, from the repository.
# The jobs of the array run one after another, and each goes on where the last one stopped.
#SBATCH --job-name=mixtral
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.log
set -euo pipefail

SHARED=${SHARED:-/shared/$USER}
export XDG_CACHE_HOME=$SHARED/cache
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
export NCCL_DEBUG=WARN
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5

source "${VENV:-.venv}/bin/activate"
srun --kill-on-bad-exit=1 python train.py --config configs/mixtral_8x7b.py \
  --data.path "$SHARED/data/corpus_32k" --workdir "$SHARED/runs/mixtral" \
  --mesh.fsdp 64 --mesh.heartbeat-seconds 60
