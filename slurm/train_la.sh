#!/bin/bash
# Trains on N nodes x P processes, with GPUs where the job has some; asked to go, it saves and queues itself again.
#
#   sbatch slurm/train_la.sh                                                   # configs/la.yaml on two CPU nodes
#   sbatch --nodes 4 --gpus-per-node 4 slurm/train_la.sh configs/la.yaml data.batch_labelled=16 data.batch_unlabelled=16
#
# Submit from the root of the repository. The arguments are `CONFIG [key=value ...]`; docs/reliability.md tells the rest.

# ---- what a site must change -----------------------------------------------------------------------------------------
#SBATCH --job-name=train_la
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Partition and account: add them here, or give them to sbatch. --mem=0: all of a node. --signal: seconds from the
# request to the kill, enough for a step and two saves (the run warns where it is not). --open-mode: the output of a
# job that was queued again goes on in the same file.

PYTHON=${PYTHON:-.venv/bin/python}                  # an environment with cclmpc_dist that every node sees
CONTAINER=${CONTAINER:-}                            # an Apptainer image with cclmpc_dist: its `python` is taken instead
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}    # a node: one a GPU; on CPU nodes one that uses every core
INTERFACE=${INTERFACE:-}                            # network interface between nodes, as in ib0; unset leaves the choice
HEAD=${HEAD:-}                                      # address of the first node; unset takes what Slurm calls it
# ----------------------------------------------------------------------------------------------------------------------

set -eu
[ $# -gt 0 ] || set -- configs/la.yaml
source launch/batch.sh
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart in a store with the addresses of the dead fails (pytorch#135712)

agents "$SLURM_NNODES" "$PROCESSES" "$endpoint" "$SLURM_JOB_ID" --max-restarts=3 launch/train.py "$@" &

await $!
settle
