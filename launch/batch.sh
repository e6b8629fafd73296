# Sourced by the batch scripts that train, under `set -eu` and with PYTHON, CONTAINER, PROCESSES, INTERFACE and HEAD set;
# their arguments are CONFIG [key=value ...]. Makes what launch/job.sh does, $run (the run folder) and $endpoint (HEAD:PORT
# on the first node), asks the ranks to save when the job must go, and queues it again.

asked=
trap 'asked=1; [ -z "${run:-}" ] || touch "$run/preempt"' USR2

source launch/job.sh
export CCLMPC_GRACE_SECONDS=$(sed -n 's/^#SBATCH --signal=B:USR2@//p' "$0") # lets the run check its time to save
run=$("${python[@]}" launch/run_folder.py "$@")
endpoint=$(rendezvous)

newest() { find "$run/checkpoints" -maxdepth 1 -name 'step-*[0-9]' 2>/dev/null | sort | tail -n 1; }
again() {
    echo "$SLURM_JOB_NAME: $1: queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "$SLURM_JOB_NAME: this cluster does not requeue: submit the job again to go on" >&2
    exit 75
}

# Sets $code once what `wait` was given has ended; a trapped signal interrupts wait.
await() { while asked=; code=0; wait "$@" || code=$?; [ -n "$asked" ]; do :; done; }

# Leaves with $code, or queues the job again where it goes on from a checkpoint of its own.
settle() {
    [ ! -e "$run/preempted" ] || again "saved at step $(cat "$run/preempted")"
    [ "$code" = 0 ] || [ "$(newest)" = "$before" ] || again "ended with $code after a new checkpoint"
    exit "$code"
}

[ -z "$asked" ] || again "asked to go before the start"
before=$(newest)
