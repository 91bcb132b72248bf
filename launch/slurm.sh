#!/usr/bin/env bash
#SBATCH --job-name=srlm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=srlm-%j.log
#
# Runs one command on every GPU node of a Slurm job, one process per node. A requeued job resumes.
# Slurm sends SIGTERM 300 s before the time limit; the program saves and exits, and the job is queued
# again. A job that Slurm preempts resumes from its last checkpoint.
#
#   sbatch --partition=PARTITION launch/slurm.sh COMMAND...
#   sbatch --nodes=8 launch/slurm.sh python -m srlm_jax.train --config=iter2:70b --workdir=/SHARED/x
#
# PARTITION: the GPU nodes of your cluster. SHARED: a file system that all nodes mount. Submit from
# the repository, after `python -m venv .venv && .venv/bin/pip install -e '.[gpu]'` in it.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo 'usage: sbatch launch/slurm.sh COMMAND...' >&2
  exit 2
fi

export SRLM_HOSTS=auto
export PATH=$SLURM_SUBMIT_DIR/.venv/bin:$PATH
# Under Slurm, JAX uses one GPU per process by default.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS

cd "$SLURM_SUBMIT_DIR"
code=0
# When one process ends, the others have 120 s, for example to save.
srun --kill-on-bad-exit=0 --wait=120 "$@" || code=$?
# 75: the program has saved. 143: SIGTERM ended it where there was nothing to save.
((code != 75 && code != 143)) || scontrol requeue "$SLURM_JOB_ID" || true
exit "$code"
