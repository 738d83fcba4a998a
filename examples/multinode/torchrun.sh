#!/usr/bin/env bash
# Train on several nodes, and go on after a failure. The same line on every node, at about the same time:
#
#   NODES=2 HEAD=10.0.0.1 RUN=runs/digits-ddp examples/multinode/torchrun.sh fit --config configs/digits.yaml
#
# NODES: how many. HEAD: the address of one of them, whose PORT (29500) the others reach. PROCESSES: on each node (1; one
# per GPU). RUN: a folder that all nodes see, for checkpoints, one every EVERY (500) steps. When a process dies, all are
# started again, RESTARTS (3) times at most, and go on from the last checkpoint; so does the line itself when it is run
# again, by hand or by your scheduler, which is the surer way: stop what is left of it first.
# ADDRESS: this node's own, where its host name does not lead to it; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME: its
# network interface, where there are several.
set -euo pipefail
: "${NODES:?}" "${HEAD:?}" "${RUN:?}"
own=()
if [ -n "${ADDRESS:-}" ]; then
  own=(--local-addr "$ADDRESS" --rdzv-conf "is_host=$([ "$ADDRESS" = "$HEAD" ] && echo true || echo false)")
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "${PROCESSES:-1}" --max-restarts "${RESTARTS:-3}" "${own[@]}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "$(basename "$RUN")" \
  -m lightning_gan_stability "$@" \
  --trainer.strategy ddp --trainer.num_nodes "$NODES" --trainer.devices "${PROCESSES:-1}" --ckpt_path last \
  --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.dirpath "$RUN" --trainer.callbacks.save_last true \
  --trainer.callbacks.every_n_train_steps "${EVERY:-500}"
