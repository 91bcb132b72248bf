#!/usr/bin/env bash
# Runs one command on every host of a Cloud TPU slice.
#
#   launch/tpu.sh TPU ZONE COMMAND...
#   launch/tpu.sh my-v5p us-east5-a python -m srlm_jax.train --config=iter2:70b --workdir=/SHARED/x
#
# TPU: the name of the TPU VM. ZONE: its zone. SHARED: a file system that every host mounts
# (Filestore, NFS).
# CHECKOUT (environment variable, default srlm_jax): the folder of the repository on the hosts,
# under $HOME. Run `python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'` in it first, for
# example with this script. The command runs in that folder, with .venv first on the path.
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo 'usage: launch/tpu.sh TPU ZONE COMMAND...' >&2
  exit 2
fi
tpu=$1 zone=$2
shift 2

printf -v command '%q ' "$@"
printf -v folder '%q' "${CHECKOUT:-srlm_jax}"
exec gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all \
  --command="cd $folder && SRLM_HOSTS=auto PATH=\$PWD/.venv/bin:\$PATH $command"
