#!/usr/bin/env bash
# Train one run on this host, on CPU ranks or on GPUs, through the deepspeed launcher.
#   launch/local.sh --ranks 2 run.toml [--resume] [--set key=value ...]
# TERM, USR1, HUP or Ctrl-C to this script: all ranks save a checkpoint, and it exits with 75; then --resume goes on.
# MASTER_PORT (29500) must differ between two runs on one host.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

[[ ${1:-} == --ranks && ${2:-} =~ ^[1-9][0-9]*$ ]] || refuse "--ranks NUMBER comes first, not '${*:1:2}'"
[[ $# -gt 2 ]] || refuse "the run file is missing"
need deepspeed "activate the Python environment of pst-ds"

# Ranks only: those in the launcher's process group. Before there are any, nothing is lost with the launcher.
stop_ranks() { pkill -TERM -g "$1" -f 'pst_ds --local_rank=' || kill -TERM -- "-$1"; }

run_stoppable stop_ranks deepspeed --num_accelerators "$2" --master_port "${MASTER_PORT:-29500}" \
  --module pst_ds train "${@:3}"
