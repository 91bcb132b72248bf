#!/usr/bin/env bash
# Runs one command as N processes of one run, on this machine. If one fails, stops all of them. On
# SIGTERM they save their work and exit with code 75: the same command continues.
#
#   launch/local.sh N COMMAND...
#   launch/local.sh 2 python -m srlm_jax.train --config=sft:tiny --workdir=runs/demo
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
port=${SRLM_PORT:-$((20000 + RANDOM % 12000))}
while [[ -z ${SRLM_PORT:-} ]] && in_use "$port"; do port=$((20000 + RANDOM % 12000)); done

pids=()
saved=75  # the exit code of a program that SIGTERM stopped: srlm_jax/preemption.py
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
}
trap 'stop 2; exit 130' INT
trap 'stop 120; exit "$end"' TERM

export SRLM_HOSTS=$hosts SRLM_COORDINATOR=127.0.0.1:$port
for ((i = 0; i < hosts; i++)); do
  ((share == 0)) || export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i*share:share}")
  SRLM_HOST=$i "$@" &
  pids[i]=$!
done

while ((${#pids[@]})); do
  sleep 0.2
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    code=$?
    unset "pids[i]"
    if ((code == saved)); then
      ((${#pids[@]} == 0)) || stop 120
      exit "$saved"
    elif ((code)); then
      echo "error: process $i of $hosts exited with code $code; stopping the others" >&2
      ((${#pids[@]} == 0)) || stop 2  # they wait for the one that failed, so they cannot save
      exit "$code"
    fi
  done
done
