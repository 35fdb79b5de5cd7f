#!/bin/bash
# A Ray cluster for the length of one Slurm job, and one command of this project on it:
#
#   sbatch cluster/slurm.sh train jobs/configs/train.toml --runs-dir runs --workers.num 4 --workers.min-num 1
#   sbatch --nodes 8 --gpus-per-node 4 cluster/slurm.sh train jobs/configs/train.toml --workers.num 32
#
# Submit it from a folder that all nodes see, with an environment .venv in it (`make setup` makes it); runs and
# datasets lie there too. A job that is preempted, loses a node or reaches its time limit writes a last checkpoint, is
# queued again and resumes. MLFLOW_TRACKING_URI is passed on; without it runs are
# recorded in mlflow.db, which a folder on NFS may lock badly: use a server there.
#SBATCH --job-name=dmvae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=dmvae-%j.log
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
export PATH=$PWD/.venv/bin:$PATH

# other people's jobs reach these ports too: every request needs a token that only this job's files know
umask 077
private=$PWD/.ray-$SLURM_JOB_ID
mkdir -p "$private"
[ -s "$private/token" ] || head -c 32 /dev/urandom | base64 >"$private/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# two jobs may share a node: ports follow the job's number
port=$((20000 + 3 * (SLURM_JOB_ID % 4000)))
address=${hosts[0]}:$port
here=(--num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)

srun --nodes 1 --ntasks 1 --overlap --nodelist "${hosts[0]}" \
  ray start --head --port "$port" --dashboard-port $((port + 1)) --ray-client-server-port $((port + 2)) \
  --temp-dir "/tmp/ray-$SLURM_JOB_ID" "${here[@]}" &
head_pid=$!
trap 'kill "$head_pid" 2>/dev/null || true; rm -rf "$private"' EXIT
until ray health-check --address "$address" 2>/dev/null; do
  kill -0 "$head_pid" # the head is gone: so is the job
  sleep 2
done
for host in "${hosts[@]:1}"; do # one srun a node, so that losing one does not end the others
  srun --nodes 1 --ntasks 1 --overlap --nodelist "$host" --kill-on-bad-exit 0 \
    ray start --address "$address" "${here[@]}" &
done

# GPUs are taken where they are when the job starts: wait until every node has joined, but not for one that is broken
there() { python -c "from ray.util.state import list_nodes; print(sum(n.state == 'ALIVE' for n in list_nodes('$address')))"; }
for _ in {1..60}; do
  [ "$(there || echo 0)" -ge "${#hosts[@]}" ] && break
  sleep 2
done

# SIGTERM comes to this script before the time limit; it is passed on, and a command that it ended (143) is queued again
RAY_ADDRESS=$address dmvae "$@" &
command_pid=$!
trap 'kill -TERM "$command_pid" 2>/dev/null || true' TERM
code=0
wait "$command_pid" || code=$?
while kill -0 "$command_pid" 2>/dev/null; do # a signal ends `wait` before the command has ended
  code=0
  wait "$command_pid" || code=$?
done
[ "$code" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
