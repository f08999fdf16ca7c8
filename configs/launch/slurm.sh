#!/bin/bash
# A bantam run on a Slurm cluster: one torchrun on each node, which starts one rank for each GPU.
#   sbatch configs/launch/slurm.sh pretrain --config configs/training/pretrain.yaml --mconf configs/models/small.yaml --out /shared/runs/small
#SBATCH --job-name=bantam
#SBATCH --nodes=2                  # machines
#SBATCH --ntasks-per-node=1        # one torchrun each; it starts the ranks itself
#SBATCH --gpus-per-node=8          # ranks of a machine
#SBATCH --cpus-per-task=64         # for all ranks of a machine together
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180          # three minutes before the time is up: save, say how to go on, end
#SBATCH --requeue                  # a preempted job is queued again, and goes on (see below)
#SBATCH --output=bantam-%j.log     # rank 0 is the only one that speaks
set -euo pipefail

# Where the ranks meet: the first machine of the job, and a port made of the job's number, so that two jobs do not take the same.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((29500 + SLURM_JOB_ID % 1000))

# Go on where the job was interrupted: when the run folder (after --out) holds checkpoints, resume from it.
out=""; previous=""
for word in "$@"; do [ "$previous" = --out ] && out=$word; previous=$word; done
more=()
if [ -n "$out" ] && compgen -G "$out/checkpoints/step-*" > /dev/null; then more=(--resume-from "$out"); fi

export OMP_WAIT_POLICY=PASSIVE     # threads that wait must not spin beside other ranks
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # when the wrong network is chosen

srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$port" \
    -m bantam "$@" "${more[@]}"
