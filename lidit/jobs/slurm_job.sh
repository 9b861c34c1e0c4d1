#!/usr/bin/env bash
# Written by `lidit launch slurm`, to be read and changed. Submit it again with: sbatch {{script}}
{{directives}}
# Logs of an earlier start of a requeued job are kept, and Slurm may start it again:
#SBATCH --open-mode=append
#SBATCH --requeue

set -uo pipefail
cd {{folder}} || exit 1

# 1. Software and environment
{{setup}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from the job

# 2. Rendezvous: the ranks meet on the first node, at a port of this job
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 10000))}

# 3. NCCL: say what goes wrong; name the network between the nodes if it takes the wrong one
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=ib0

# 4. What is run; RUN keeps the logs
{{command}}
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
JOB=${JOB:-$SLURM_JOB_ID}
mkdir -p "$RUN/logs" && touch "$RUN/logs/$JOB.started"

# 5. One task per rank; each sees all GPUs of its node and takes its own. If one fails, the others are ended
status=0
srun --kill-on-bad-exit=1 --open-mode=append --output="$RUN/logs/$JOB-rank%t.log"{{srun}} \
  {{python}} -m lidit "${COMMAND[@]}" || status=$?
{{after}}
exit $status
