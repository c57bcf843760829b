#!/usr/bin/env bash
# One run over one or more machines with torchrun. Start it on every machine with the same arguments:
#
#   launch/torchrun.sh configs/gkd_gsm8k.yaml [key.path=value ...]                                    # one machine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh configs/gkd_gsm8k.yaml parallel.data=2    # on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun.sh configs/gkd_gsm8k.yaml parallel.data=2    # on node1
#
# NPROC_PER_NODE   ranks on this machine; by default its GPUs, 1 without any
# NNODES           machines (1)
# NODE_RANK        which of them this is, from 0 (0)
# MASTER_ADDR      name or address of machine 0; needed when NNODES is above 1
# MASTER_PORT      a free port on it (29500)
# START_TIMEOUT    seconds that machines wait for each other at the start (600)
# OMP_NUM_THREADS  threads of each rank; by default the cores that this shell may use, shared among its ranks
# INTERFACE        network interface of gloo and NCCL, where the host name's address is another (`opd-megatron doctor`)
# OPD_MEGATRON_NUMA  0 leaves ranks on all cores; otherwise each stays on those near its GPU
#
# output_dir must lie on storage that all machines see. SIGTERM or SIGUSR1 to this process, on any machine, lets the run
# save its current step and end with exit code 0; the same command goes on from there.
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
else
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
nproc=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
nnodes=${NNODES:-1}
cores=$(command nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

if [ "$nnodes" -eq 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$nnodes" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the name of machine 0}" --master-port "${MASTER_PORT:-29500}"
        --rdzv-conf "timeout=${START_TIMEOUT:-600}")
fi
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
exec "$python" -m opd_megatron.command.agent "${rendezvous[@]}" --nproc-per-node "$nproc" -m opd_megatron.train "$@"
