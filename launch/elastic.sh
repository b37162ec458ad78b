#!/usr/bin/env bash
# Train one run on hosts that may fail, leave and join, through torchrun. On every host, with the same options:
#   launch/elastic.sh --hosts 2:4 --ranks 8 --meet node1:29400 run.toml [--set key=value ...]
# It starts with two hosts or more, of 8 ranks each, that meet at the first one; without --meet on this host alone.
# After a failure, and when a host joins, all ranks go on from the newest checkpoint with the hosts that are there.
# TERM, USR1, HUP or Ctrl-C to this script: all ranks save a checkpoint, and it exits with 75. Bad input exits with 2.
# Other options of torchrun are variables (docs/how-to/launch.md): PET_MAX_RESTARTS=20, PET_LOCAL_ADDR, PET_RDZV_CONF.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

while [[ ${1:-} == --* && $# -gt 1 ]]; do
  case $1 in
    --hosts) export PET_NNODES=$2 ;;
    --ranks) export PET_NPROC_PER_NODE=$2 ;;
    --meet) export PET_RDZV_ENDPOINT=$2 ;;
    *) refuse "--hosts, --ranks or --meet is expected, not '$1'" ;;
  esac
  shift 2
done
[[ $# -gt 0 && $1 != --* ]] || refuse "the run file is missing"
engine=${PST_DS_ENGINE:-torchrun} # or ft_launcher of nvidia-resiliency-ext, which takes the same options
need "$engine" "activate the Python environment of pst-ds"
# Hosts join within 15 seconds after the first ones, and later by a new start of all ranks.
export PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT=${PET_RDZV_ENDPOINT:-localhost:0} PET_RDZV_ID=${PET_RDZV_ID:-pst-ds}
export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-20} PET_RDZV_CONF=${PET_RDZV_CONF:-last_call_timeout=15}
# A store that outlives its ranks makes the next ones hang (torch 2.13). Ranks save before they end, in ten minutes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# torchrun loses the exit codes of its ranks.
PST_DS_EXIT_CODES=$(mktemp -d) && export PST_DS_EXIT_CODES && trap 'rm -rf "$PST_DS_EXIT_CODES"' EXIT

stopped='' code=0
# shellcheck disable=SC2317 # called by run_stoppable; a second signal would end torchrun before its ranks
stop_torchrun() { [[ $stopped ]] || kill -TERM "$1" && stopped=1; }
run_stoppable stop_torchrun "$engine" -m pst_ds train "$@" --resume || code=$?
grep -qsx 2 "$PST_DS_EXIT_CODES"/* && exit 2
[[ $code -eq 0 ]] && exit 0
[[ $stopped ]] && code=75 || code=1
exit "${PST_DS_RETRY_CODE:-$code}" # for schedulers that start again after certain codes
