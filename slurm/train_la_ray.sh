#!/bin/bash
# Trains on a Ray cluster that it starts on the job's nodes; asked to go, it saves and queues itself again.
#
#   sbatch slurm/train_la_ray.sh                                               # configs/la.yaml on two CPU nodes
#   sbatch --nodes 4 --gpus-per-node 4 slurm/train_la_ray.sh configs/la.yaml data.batch_labelled=16 data.batch_unlabelled=16
#
# Submit from the root of the repository. The arguments are `CONFIG [key=value ...]`; docs/ray.md tells the rest.

# ---- what a site must change -----------------------------------------------------------------------------------------
#SBATCH --job-name=train_la_ray
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

PYTHON=${PYTHON:-.venv/bin/python}                  # an environment with cclmpc_dist and Ray that every node sees
CONTAINER=${CONTAINER:-}                            # an Apptainer image with both: its `python` is taken instead
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}    # a node: one a GPU; on CPU nodes one that uses every core
INTERFACE=${INTERFACE:-}                            # network interface between nodes, as in ib0; unset leaves the choice
HEAD=${HEAD:-}                                      # address of the first node; unset takes what Slurm calls it
# ----------------------------------------------------------------------------------------------------------------------

set -eu
[ $# -gt 0 ] || set -- configs/la.yaml
source launch/batch.sh
export RAY_AUTH_MODE=token # anyone who reaches the head's port could run code there
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')} # of this job alone
export RAY_worker_niceness=0 # the nodes are the job's: at Ray's 15 its workers come after everything else
export RAY_USAGE_STATS_ENABLED=0 # a node sends nothing to Ray's makers
export RAY_COLOR_PREFIX=0 # the output is a file
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # asked to end, a node does so at once, not after half a minute

# Waits until Ray's head listens on the first node.
listens() { until (exec 3<>"/dev/tcp/${endpoint%:*}/${endpoint##*:}") 2>/dev/null; do sleep 1; done; }
export HEAD endpoint
export -f address listens

# One Ray a node. Where Slurm has a node's address as a number Ray takes it, elsewhere that of the way to the head.
# No data goes through Ray's object store. --kill-on-bad-exit: a node that loses its Ray ends the job, where the others
# would wait for it in vain.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 --label bash -c '
    if [ "$SLURM_NODEID" = 0 ]; then
        own=$HEAD
        set -- "$@" --head --port="${endpoint##*:}" --temp-dir="/tmp/ray-$SLURM_JOB_ID"
    else
        own=$(address "$SLURMD_NODENAME")
        set -- "$@" --address="$endpoint"
        listens
    fi
    [[ ! $own =~ ^[0-9.]+$ ]] || set -- "$@" --node-ip-address="$own"
    exec "$@"' ray "${python[@]}" -m ray.scripts.scripts start --block --log-color=false \
    --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --object-store-memory=100000000 \
    &> "$run/ray.log" &
cluster=$!

{
    listens
    RAY_ADDRESS=$endpoint exec "${python[@]}" launch/ray_train.py --config "$1" --storage "$PWD" \
        --workers $((SLURM_NNODES * PROCESSES)) --cpus "$OMP_NUM_THREADS" "${@:2}"
} &
driver=$!

await -n "$cluster" "$driver"
if kill "$driver" 2>/dev/null; then
    echo "$SLURM_JOB_NAME: Ray ended before the run: $run/ray.log and /tmp/ray-$SLURM_JOB_ID on the nodes tell why" >&2
    [ "$code" != 0 ] || code=1
else
    kill "$cluster" || true
    wait "$cluster" || true
    srun --ntasks-per-node=1 --overlap rm -rf "/tmp/ray-$SLURM_JOB_ID"
fi
settle
