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
[ $# -gt 0 ] || set -- configs/la.yaml
source launch/job.sh
mkdir -p "$RESULTS"

# measure NODES PROCESSES FILE CONFIG [key=value ...]: one point, on the first nodes
measure() {
    local nodes=$1 processes=$2 file=$3
    shift 3
    endpoint=$(rendezvous)
    echo "bench_scaling.sh: ranks $((nodes * processes)), nodes $nodes"
    agents "$nodes" "$processes" "$endpoint" "$SLURM_JOB_ID-$nodes-$processes" -m cclmpc_dist bench scale "$@" \
        --mode="$MODE" --steps="$STEPS" --out="$file"
}

points=()
predict=(--predict)
[ "$MODE" = weak ] || predict=() # strong scaling has no step to predict from
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
"${python[@]}" -m cclmpc_dist bench gather "${points[@]}" "${predict[@]}" --out "$RESULTS/scale.json"
echo "bench_scaling.sh: $RESULTS/scale.json, .md and .png"
