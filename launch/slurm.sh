#!/usr/bin/env bash
#SBATCH --job-name=srlm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --output=srlm-%j.log
#
# Runs one command on every GPU node of a Slurm job, one process per node. From the repository:
#
#   install: python -m venv .venv && .venv/bin/pip install -e '.[gpu]'
#   run:     sbatch --partition=PARTITION launch/slurm.sh COMMAND...
#            sbatch --nodes=8 launch/slurm.sh python -m srlm_jax.train --config=iter2:70b --workdir=/SHARED/x
#   logs:    tail -F srlm-JOB.log
#   delete:  scancel JOB
#
# PARTITION: the GPU nodes of your cluster. SHARED: a file system that all nodes mount; the
# repository must be on one, too. JOB: the number that sbatch prints.
#
# Slurm sends SIGTERM 300 s before the time limit; the program saves and exits. Then, and when a
# process is lost, the job is queued again and continues, at most SRLM_RESTARTS times (20). A job that
# Slurm preempts, or that loses a node, continues in the same way. The queued job may have another
# number of nodes: scontrol update jobid=JOB numnodes=2
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
# 75: the program has saved, or lost a host. Above 128: a signal ended a process; 130: Ctrl-C.
if ((code == 75 || code > 128 && code != 130)) && ((${SLURM_RESTART_COUNT:-0} < ${SRLM_RESTARTS:-20})); then
  # A job that was cancelled is no longer running.
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
  [[ $state != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
