#!/bin/bash
# Shards a corpus as a job array, one part a task, and merges the parts once all are there.
#
#   sbatch slurm/shard_corpus.sh LA/volumes --format la-h5 --list LA/train.list --labelled 8 --val-last 16 --out data/la
#   sbatch --array=1-32%8 slurm/shard_corpus.sh corpus --format la-h5 --out /scratch/corpus      # 32 parts, 8 at a time
#
# Submit from the root of the repository. The arguments are those of `cclmpc shard`. After a failure, the same
# submission again goes on: parts and shards that are complete stay.

# ---- what a site must change -----------------------------------------------------------------------------------------
#SBATCH --job-name=shard_corpus
#SBATCH --array=1-2
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# Partition and account: add them here, or give them to sbatch; the merge takes the same. --array: from 1, one a part.
# --exclusive, --mem=0: a node a task, all of it; without, give --cpus-per-task, and some volumes' memory a core.

PYTHON=${PYTHON:-.venv/bin/python}     # an environment with cclmpc_dist that every node sees
CONTAINER=${CONTAINER:-}               # an Apptainer image with cclmpc_dist: its `python` is taken instead
LOGS=${LOGS:-.}                        # folder for what the merge prints
MERGE_TIME=${MERGE_TIME:-1:00:00}      # it reads the parts' rows, not the shards
# ----------------------------------------------------------------------------------------------------------------------

set -eu
refuse() {
    echo "shard_corpus.sh: $1" >&2
    exit 2
}

task=${SLURM_ARRAY_TASK_ID:-}
[ -n "$task" ] || refuse "not a task of a job array: submit it with sbatch --array=1-N"
[ "$SLURM_ARRAY_TASK_MIN" = 1 ] && [ "$SLURM_ARRAY_TASK_MAX" = "$SLURM_ARRAY_TASK_COUNT" ] ||
    refuse "tasks $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX, $SLURM_ARRAY_TASK_COUNT of them: number the parts from 1, --array=1-N"

out= last=
for word in "$@"; do
    case $word in --part | --part=*) refuse "--part: the array sets it, leave it out" ;; --out=*) out=${word#--out=} ;; esac
    [ "$last" != --out ] || out=$word
    last=$word
done
[ -n "$out" ] || refuse "no --out FOLDER: give the arguments of cclmpc shard"

python=("$PYTHON")
[ -z "$CONTAINER" ] || python=(apptainer exec "$CONTAINER" python)
command -v "${python[0]}" >/dev/null || refuse "${python[0]}: no such program: set PYTHON, or submit from the repository's root"

merge=merge_$SLURM_ARRAY_JOB_ID
if [ "$task" = 1 ] && [ -z "$(squeue --noheader --name="$merge")" ]; then # a task that was queued again finds it there
    sbatch --job-name="$merge" --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes \
        --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} --time="$MERGE_TIME" \
        --ntasks=1 --output="$LOGS/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID}_merge.out" \
        --wrap="exec $(printf '%q ' "${python[@]}" -m cclmpc_dist merge "$out")"
fi

exec "${python[@]}" -m cclmpc_dist shard --workers "$SLURM_CPUS_ON_NODE" "$@" --part "$task/$SLURM_ARRAY_TASK_COUNT"
