#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU slice, or of several slices, by queued resources.
#
#   export TPU=my-v5p ZONE=us-east5-a TYPE=v5p-256 VERSION=v2-alpha-tpuv5
#   launch/tpu.sh install    # requests the slices, waits for them, installs this commit on every host
#   launch/tpu.sh run python -m srlm_jax.train --config=iter2:70b --workdir=/SHARED/x
#   launch/tpu.sh logs       # follows the log of the first host
#   launch/tpu.sh stop       # SIGTERM: the program saves and ends; the same `run` continues
#   launch/tpu.sh delete     # gives the slices back
#
# TPU: a name for the queued resource. ZONE, TYPE, VERSION: its zone, accelerator type and runtime.
# SLICES: their number (1). Cloud TPU connects several by itself (MEGASCALE). SPOT=1: spot machines.
# PYTHON: Python 3.11 or later on the hosts (python3). SHARED: a file system that every host mounts
# (Filestore, NFS).
#
# `run` returns when the command has ended on all hosts. The command does not need this machine: after
# an interruption, give the same `run` again. If slices are preempted, `run` deletes the queued
# resource, requests it again, installs, and continues the command. If a host is lost or its program
# has saved, `run` continues it on the same slices. Both together at most SRLM_RESTARTS times (20).
# shellcheck disable=SC2016  # the hosts expand what is in single quotes
set -euo pipefail

usage() {
  echo 'usage: TPU=NAME ZONE=ZONE TYPE=TYPE VERSION=VERSION launch/tpu.sh' \
    'install|run COMMAND...|logs|stop|delete' >&2
  exit 2
}
[[ $# -ge 1 && -n ${TPU:-} && -n ${ZONE:-} ]] || usage
verb=$1
shift
poll=${SRLM_POLL:-30}  # seconds between two looks at the hosts

resource() { gcloud compute tpus queued-resources "$1" "$TPU" --zone="$ZONE" "${@:2}"; }
on_hosts() { resource ssh --node=all --worker=all --command="cd srlm_jax && ($1)"; }

state() {  # of the queued resource and its nodes, for example: ACTIVE READY READY
  local found
  if ! found=$(resource describe --format='value(state.state)' 2>&1); then
    [[ $found == *NOT_FOUND* ]] && found=ABSENT || found="UNKNOWN ($found)"
  fi
  echo "$found" "$(gcloud compute tpus tpu-vm list --zone="$ZONE" --format='value(state)' \
    --filter="name ~ '/$TPU(-[0-9]+)?$'" | tr '\n' ' ')"
}

create() {
  [[ -n ${TYPE:-} && -n ${VERSION:-} ]] || usage
  local nodes=(--node-id="$TPU")
  ((${SLICES:-1} == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$TPU")
  resource create "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    ${SPOT:+--spot}
}

delete() { resource delete --force --quiet; }

install() {
  local now archive
  while now=$(state); [[ $now != ACTIVE* || $now == *PREEMPTED* ]]; do
    case $now in
      ABSENT*) create ;;
      *SUSPENDED* | *FAILED* | ACTIVE*) echo "$TPU is $now: requests it again" >&2; delete; create ;;
      *) echo "$TPU is $now" >&2; sleep "$poll" ;;
    esac
  done
  archive=$(mktemp -d)/srlm_jax.tar.gz
  git -C "$(dirname "$0")/.." archive --output="$archive" HEAD
  gcloud compute tpus queued-resources scp "$archive" "$TPU:" --zone="$ZONE" --node=all --worker=all
  rm -r "$(dirname "$archive")"
  resource ssh --node=all --worker=all --command="mkdir -p srlm_jax && cd srlm_jax &&
    tar xzf ../srlm_jax.tar.gz && ${PYTHON:-python3} -m venv .venv &&
    .venv/bin/pip install --quiet -e '.[tpu]'"
}

# Where it does not run already: then flock fails. `stop` sends SIGTERM to its session, in which this
# shell waits for the command.
start() {
  local command
  printf -v command '%q ' "$@"
  printf -v command '%q' "echo \$PPID >run.pid; rm -f run.code run.stopped; trap : TERM
    SRLM_HOSTS=auto PATH=\$PWD/.venv/bin:\$PATH $command; echo \$? >run.code"
  on_hosts "setsid flock --nonblock run.lock bash -c $command >>run.log 2>&1 </dev/null &"
}

codes() {  # of all hosts: `running`, an exit code, or `lost` if the machine was started again
  on_hosts 'if flock --nonblock run.lock true; then cat run.code || echo lost; else echo running; fi
    if [[ -e run.stopped ]]; then echo stopped; fi'
}

run() {
  local now found
  for ((restarts = ${SRLM_RESTARTS:-20}; restarts >= 0; restarts--)); do
    now=$(state)
    [[ $now == ACTIVE* && $now != *PREEMPTED* ]] || install
    start "$@"
    found=running
    while [[ $found == *running* ]]; do
      sleep "$poll"
      now=$(state)
      [[ $now != UNKNOWN* ]] || continue  # gcloud could not be reached
      [[ $now == ACTIVE* && $now != *PREEMPTED* ]] || { found=preempted; break; }
      found=$(codes 2>/dev/null | sort -u | tr '\n' ' ') || found=running  # a host did not answer
    done
    case $found in
      '0 ') return ;;
      *stopped*) echo "$TPU: stopped; the same command continues" >&2; return 75 ;;
      preempted | *75* | *lost* | *129* | *1[3-9][0-9]*) echo "$TPU: $now; ended with $found; continues" >&2 ;;
      *) echo "error: the command ended with $found; see launch/tpu.sh logs" >&2; return 1 ;;
    esac
  done
  echo "error: the command did not end after ${SRLM_RESTARTS:-20} restarts" >&2
  return 75
}

case $verb in
  install) install ;;
  run) [[ $# -ge 1 ]] || usage; run "$@" ;;
  logs) resource ssh --node=0 --worker=0 --command='tail -n 100 -F srlm_jax/run.log' ;;
  stop) on_hosts 'touch run.stopped; kill -TERM -- -$(cat run.pid)' ;;
  delete) delete ;;
  *) usage ;;
esac
