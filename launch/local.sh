#!/usr/bin/env bash
# Runs one command as N processes of one run, on this machine. On SIGTERM they save their work and
# exit with code 75: the same command continues. If a process is killed or exits with 75 by itself,
# all are started again, at most SRLM_RESTARTS times (3). If one fails, the others are stopped.
#
#   launch/local.sh N COMMAND...
#   launch/local.sh 2 python -m srlm_jax.train --config=sft:tiny --workdir=runs/demo
#
# Install with `make setup`. The output is the log. N may change when a command continues.
#
# CPU: each process gets the number of fake devices that the environment sets:
#   JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
# GPU: CUDA_VISIBLE_DEVICES=0,1,2,3 is divided equally among the processes. One process can use all
#   GPUs of a machine; several processes are for testing runs on several machines.
# SRLM_PORT: the port of the coordinator; by default a free port.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo 'usage: launch/local.sh N COMMAND...' >&2
  exit 2
fi
hosts=$1
shift

gpus=()
[[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
if ((${#gpus[@]} % hosts)); then
  echo "error: CUDA_VISIBLE_DEVICES names ${#gpus[@]} GPUs, not a multiple of $hosts processes" >&2
  exit 2
fi
share=$((${#gpus[@]} / hosts))

in_use() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
saved=75  # the exit code of a program that SIGTERM or the loss of a host ended: srlm_jax/preemption.py
stop() {  # SIGTERM, and after $1 seconds SIGKILL
  kill "${pids[@]}" 2>/dev/null
  for ((tries = 0; tries < 10 * $1; tries++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  kill -9 "${pids[@]}" 2>/dev/null
  end=143
  for pid in "${pids[@]}"; do
    wait "$pid" 2>/dev/null
    (($? != saved)) || end=$saved
  done
  pids=()
}
trap 'stop 2; exit 130' INT
trap 'stop 120; exit "$end"' TERM

start() {
  local port=${SRLM_PORT:-$((20000 + RANDOM % 12000))}
  while [[ -z ${SRLM_PORT:-} ]] && in_use "$port"; do port=$((20000 + RANDOM % 12000)); done
  export SRLM_HOSTS=$hosts SRLM_COORDINATOR=127.0.0.1:$port
  for ((i = 0; i < hosts; i++)); do
    if ((share)); then
      CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i*share:share}")
      export CUDA_VISIBLE_DEVICES
    fi
    SRLM_HOST=$i "$@" &
    pids[i]=$!
  done
}

run() {  # -> 0, or the exit code of the first process that did not end with 0
  while ((${#pids[@]})); do
    sleep 0.2
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}"
      code=$?
      unset "pids[i]"
      ((code)) || continue
      if ((code == saved)); then
        stop 120  # the others save too
      else
        echo "error: process $i of $hosts exited with code $code; stopping the others" >&2
        stop 2    # they wait for the one that failed, so they cannot save
      fi
      return "$code"
    done
  done
  return 0
}

pids=()
for ((restarts = ${SRLM_RESTARTS:-3}; ; restarts--)); do
  start "$@"
  run
  code=$?
  # Above 128: killed by a signal. 130: by Ctrl-C.
  ((restarts > 0 && (code == saved || code > 128 && code != 130))) || exit "$code"
  echo "starting all $hosts processes again" >&2
done
