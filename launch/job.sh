# Sourced by the batch scripts, under `set -eu` and with PYTHON, CONTAINER, PROCESSES, INTERFACE and HEAD set. Makes the
# job's environment, python, hosts, HEAD, and `agents`, which starts torchrun on some of the nodes.

python=("$PYTHON")
[ -z "$CONTAINER" ] || python=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} "$CONTAINER" python)

export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1)) # torchrun would take 1
export NCCL_DEBUG=WARN # says why a connection failed, and nothing while all is well
export PYTHONFAULTHANDLER=1 # a crash in native code leaves a Python stack
if [ -n "$INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE # the first interface found can be one that leads to no other node
    export GLOO_SOCKET_IFNAME=$INTERFACE # gloo takes the host name's, which is often the loopback
fi

# The node's address, as Slurm has it.
address() { scontrol --oneliner show node "$1" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/'; }
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HEAD:-$(address "${hosts[0]}")}

# Prints HEAD:PORT on the first node.
rendezvous() { "${python[@]}" launch/rendezvous.py "$HEAD" "$SLURM_JOB_ID"; }

# agents NODES PROCESSES ENDPOINT ID [option ...] PROGRAM [argument ...]: torchrun on the first nodes of the job.
# --cpus-per-task: srun does not take it over from sbatch, and would bind a node's ranks to one core.
# --kill-on-bad-exit: a killed agent ends the others, which would wait for it in vain.
agents() {
    local nodes=$1 processes=$2 endpoint=$3 id=$4 first
    shift 4
    first=$(printf '%s,' "${hosts[@]:0:nodes}")
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --nodelist="${first%,}" \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 bash -c '
        [ "$SLURM_NODEID" = 0 ] && host=true || host=false
        # The first node holds the store, whatever name it goes by; the others wait while it still reads Python from afar.
        export PET_RDZV_CONF=is_host=$host,read_timeout=300
        exec "$@"' torchrun "${python[@]}" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$processes" \
        --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$id" "$@"
}
