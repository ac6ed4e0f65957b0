#!/usr/bin/env bash
# A training run on a site with Slurm: Ray is started on the nodes of the allocation, the script runs on the first of
# them, and Ray is stopped. Nothing stays behind, and Slurm counts the time.
#
#     sbatch cluster/slurm.sh examples/digits.py --num-workers 8 --storage-path /shared/runs
#
# The directory that this is submitted from, the virtual environment and the storage path must be on a file system that
# all nodes mount.
#SBATCH --job-name=raylight
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one Ray node each, which gives out the node's CPUs and GPUs itself
#SBATCH --exclusive             # else another user's processes reach Ray's ports on the same machine
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120       # two minutes before the end: raylight stops at a step and writes a checkpoint
#SBATCH --output=%x-%j.log

set -euo pipefail

source "${RAYLIGHT_VENV:-$HOME/raylight-env}/bin/activate"

# A token for this run alone, which srun hands to its tasks with the environment: other users cannot reach the cluster.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=120  # nodes start at their own pace; Ray's default is 30 s
export RAY_gcs_rpc_server_reconnect_timeout_s=15   # for so long the others wait for a head that has ended; default 60

# The address of the first node as the others see it; Ray's own port is per job, since nodes can be shared.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))

# On each node: starts Ray, the first as head; runs the script on the first when all are there; stops Ray at its end.
exec srun --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_JOB_NUM_NODES" --dashboard-host 127.0.0.1 -- \
    env RAY_ADDRESS="$address:$port" python "$@"
