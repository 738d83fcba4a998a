#!/usr/bin/env bash
# The same under SLURM, which starts one process per task: Lightning reads ranks and addresses from SLURM's variables.
#
#   sbatch examples/multinode/slurm.sh fit --config configs/digits.yaml
#
# A job that is queued again (--requeue, after a node has failed) goes on from the last checkpoint. Lightning saves one and
# queues the job again by itself when SLURM sends SIGUSR1, 90 seconds before the time limit.
#SBATCH --job-name=gan-stability
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@90
set -euo pipefail
srun python -m lightning_gan_stability "$@" \
  --trainer.strategy ddp --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --ckpt_path last \
  --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.dirpath "runs/$SLURM_JOB_ID" --trainer.callbacks.save_last true \
  --trainer.callbacks.every_n_train_steps "${EVERY:-500}"
