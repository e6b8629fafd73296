#!/bin/bash
# Measures the training step on one rank, on one node, and on more and more nodes up to all of the job: one report.
#
#   sbatch slurm/bench_scaling.sh                                              # configs/la.yaml, two CPU nodes
#   sbatch --nodes 8 --gpus-per-node 4 slurm/bench_scaling.sh configs/la.yaml data.workers=4
#
# Submit from the root of the repository. The arguments are `CONFIG [key=value ...]`; docs/benchmarks.md tells what is
# measured. The batches of the configuration are each rank's.

# ---- what a site must change -----------------------------------------------------------------------------------------
#SBATCH --job-name=bench_scaling
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
# Partition and account: add them here, or give them to sbatch. --exclusive and --mem=0: all of a node, alone.

PYTHON=${PYTHON:-.venv/bin/python}                  # an environment with cclmpc_dist that every node sees
CONTAINER=${CONTAINER:-}                            # an Apptainer image with cclmpc_dist: its `python` is taken instead
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}    # a node: one a GPU; on CPU nodes one that uses every core
INTERFACE=${INTERFACE:-}                            # network interface between nodes, as in ib0; unset leaves the choice
HEAD=${HEAD:-}                                      # address of the first node; unset takes what Slurm calls it
MODE=${MODE:-weak}                                  # weak: each rank keeps its batch; strong: all ranks together do
STEPS=${STEPS:-20}                                  # that the medians of a round are of
ROUNDS=${ROUNDS:-3}                                 # how often each number of ranks is measured, in turns
RESULTS=${RESULTS:-runs/bench_scaling-$SLURM_JOB_ID} # folder for the report, which every node sees
# ----------------------------------------------------------------------------------------------------------------------

set -eu
python=("$PYTHON")
[ -z "$CONTAINER" ] || python=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} "$CONTAINER" python)
[ $# -gt 0 ] || set -- configs/la.yaml

export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1)) # one rank alone has no more
export NCCL_DEBUG=WARN # says why a connection failed, and nothing while all is well
if [ -n "$INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE # the first interface found can be one that leads to no other node
    export GLOO_SOCKET_IFNAME=$INTERFACE # gloo takes the host name's, which is often the loopback
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HEAD:-$(scontrol --oneliner show node "${hosts[0]}" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')}
mkdir -p "$RESULTS"

# measure NODES PROCESSES FILE CONFIG [key=value ...]: one point, on the first nodes
measure() {
    local nodes=$1 processes=$2 file=$3 first
    shift 3
    first=$(printf '%s,' "${hosts[@]:0:nodes}")
    endpoint=$("${python[@]}" launch/rendezvous.py "$HEAD" "$SLURM_JOB_ID")
    echo "bench_scaling.sh: $((nodes * processes)) rank(s) on $nodes node(s)"
    # --cpus-per-task: srun does not take it over from sbatch, and would bind a node's ranks to one core.
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --nodelist="${first%,}" \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 bash -c '
        [ "$SLURM_NODEID" = 0 ] && host=true || host=false
        # The first node holds the store, whatever name it goes by; the others wait while it reads Python from afar.
        export PET_RDZV_CONF=is_host=$host,read_timeout=300
        exec "$@"' torchrun "${python[@]}" -m torch.distributed.run \
        --nnodes="$nodes" --nproc-per-node="$processes" --rdzv-backend=c10d --rdzv-endpoint="$endpoint" \
        --rdzv-id="$SLURM_JOB_ID-$nodes-$processes" -m cclmpc_dist bench scale "$@" --mode="$MODE" --steps="$STEPS" \
        --out="$file"
}

points=()
for ((round = 1; round <= ROUNDS; round++)); do
    sizes=("1 1")
    [ "$PROCESSES" = 1 ] || sizes+=("1 $PROCESSES")
    for ((nodes = 2; nodes < SLURM_NNODES; nodes *= 2)); do sizes+=("$nodes $PROCESSES"); done
    [ "$SLURM_NNODES" = 1 ] || sizes+=("$SLURM_NNODES $PROCESSES")
    for size in "${sizes[@]}"; do
        file=$RESULTS/point-${size/ /x}-$round.json
        rm -f "$file"
        # shellcheck disable=SC2086
        measure $size "$file" "$@"
        [ ! -e "$file" ] || points+=("$file") # a strong scaling leaves out ranks that do not divide the batches
    done
done
"${python[@]}" -m cclmpc_dist bench gather "${points[@]}" --predict --out "$RESULTS/scale.json"
echo "bench_scaling.sh: $RESULTS/scale.json, .md and .png"
