#!/usr/bin/env bash
# Train one run on this host, on CPU ranks or on GPUs, through the deepspeed launcher.
#   launch/local.sh --ranks 2 run.toml [--set key=value ...]
set -euo pipefail

usage() { sed -n '2,3s/^# \{0,3\}//p' "$0"; }

ranks=
while [[ $# -gt 0 ]]; do
  case "$1" in
    --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
    -h | --help) usage; exit 0 ;;
    *) break ;;
  esac
done
[[ $# -gt 0 && -n $ranks ]] || { usage >&2; exit 2; }

# One thread a rank: spinning threads of many ranks on few cores cost a factor of ten.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Keep freed memory in the process: glibc would otherwise fault every large temporary in anew.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1073741824}

exec deepspeed --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" --module pst_ds train "$@"
