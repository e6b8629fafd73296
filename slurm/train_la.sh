#!/bin/bash
# Trains on N nodes x P processes, with GPUs where the job has some; asked to go, it saves and queues itself again.
#
#   sbatch slurm/train_la.sh                                                   # configs/la.yaml on two CPU nodes
#   sbatch --nodes 4 --gpus-per-node 4 slurm/train_la.sh configs/la.yaml data.batch_labelled=16 data.batch_unlabelled=16
#
# Submit from the root of the repository. The arguments are those of `cclmpc train`; docs/reliability.md tells the rest.

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
asked=
trap 'asked=1; [ -z "${run:-}" ] || touch "$run/preempt"' USR2

python=("$PYTHON")
[ -z "$CONTAINER" ] || python=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} "$CONTAINER" python)
[ $# -gt 0 ] || set -- configs/la.yaml

export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1)) # torchrun would take 1
export NCCL_DEBUG=WARN # says why a connection failed, and nothing while all is well
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart in a store with the addresses of the dead fails (pytorch#135712)
export PYTHONFAULTHANDLER=1 # a crash in native code leaves a Python stack
export CCLMPC_GRACE_SECONDS=$(sed -n 's/^#SBATCH --signal=B:USR2@//p' "$0") # lets the run check its time to save
if [ -n "$INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE # the first interface found can be one that leads to no other node
    export GLOO_SOCKET_IFNAME=$INTERFACE # gloo takes the host name's, which is often the loopback
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
HEAD=${HEAD:-$(scontrol --oneliner show node "$first" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')}
run=$("${python[@]}" launch/run_folder.py "$@")
endpoint=$("${python[@]}" launch/rendezvous.py "$HEAD" "$SLURM_JOB_ID")

newest() { find "$run/checkpoints" -maxdepth 1 -name 'step-*[0-9]' 2>/dev/null | sort | tail -n 1; }
again() {
    echo "train_la.sh: $1: queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "train_la.sh: this cluster does not requeue: submit the job again to go on" >&2
    exit 75
}

[ -z "$asked" ] || again "asked to go before the start"
before=$(newest)
# --cpus-per-task: srun does not take it over from sbatch, and would bind a node's ranks to one core.
# --kill-on-bad-exit: a killed agent ends the job, where the others would wait for it in vain.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 bash -c '
    [ "$SLURM_NODEID" = 0 ] && host=true || host=false
    # The first node holds the store, whatever name it goes by; the others wait while it still reads Python from afar.
    export PET_RDZV_CONF=is_host=$host,read_timeout=300
    exec "$@"' torchrun "${python[@]}" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$PROCESSES" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$SLURM_JOB_ID" \
    launch/train.py "$@" &

while asked=; code=0; wait $! || code=$?; [ -n "$asked" ]; do :; done # a trapped signal interrupts wait

[ ! -e "$run/preempted" ] || again "saved at step $(cat "$run/preempted")"
[ "$code" = 0 ] || [ "$(newest)" = "$before" ] || again "ended with $code after a new checkpoint"
exit "$code"
