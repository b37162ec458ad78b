#!/usr/bin/env bash
# Train one run on several hosts, through the deepspeed launcher, pdsh and ssh.
#   launch/multinode.sh --hostfile FILE run.toml [--resume] [--set key=value ...]
# FILE has a line a host, such as "node1 slots=8". This folder and the Python environment are at the same place on all.
# TERM, USR1, HUP or Ctrl-C to this script: all ranks save a checkpoint, and it exits with 75; then --resume goes on.
# MASTER_ADDR is the first host's first address, MASTER_PORT 29500, unless they are set.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
forwarded='CUDA|DS|GLOO|HF|MALLOC|NCCL|OMP|PST_DS|TOKENIZERS|TORCH|TRANSFORMERS|TRITON'

[[ ${1:-} == --hostfile && -f ${2:-} ]] || refuse "--hostfile FILE, an existing file, comes first, not '${*:1:2}'"
[[ $# -gt 2 ]] || refuse "the run file is missing"
need deepspeed "activate the Python environment of pst-ds" && need pdsh "install it, with its ssh module"
hosts=$(awk 'NF && $1 !~ /^#/ {print $1}' "$2" | paste -sd,)
# A host that is gone ends its ssh, and so the job, in a minute and not with TCP's patience of hours.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -oBatchMode=yes -oServerAliveInterval=15 -oServerAliveCountMax=4"
address=${MASTER_ADDR:-$(ssh -oBatchMode=yes "${hosts%%,*}" hostname -I | cut -d' ' -f1)} ||
  refuse "'ssh ${hosts%%,*} hostname -I' failed: set up ssh without a password, or set MASTER_ADDR"
port=${MASTER_PORT:-29500}

# The launcher prints what it forwards, so no tokens, and hands a file and arguments to a shell on each host, in double
# quotes (arguments only if they have spaces); pdsh replaces %h, %n and %u in them.
escape() { sed 's/[\\$`]/\\&/g; s/%/%%/g'; }
values=$(env -0 | grep -zE "^($forwarded)_" | grep -zv '^[^=]*TOKEN=' | tr '\n\0' '\1\n' | escape | sed 's/"/\\"/g')
[[ $values != *$'\1'* ]] || refuse "a variable with a line break cannot be forwarded: $(grep -m1 $'\1' <<<"$values")"
own=${DS_ENV_FILE:-.deepspeed_env} # where the launcher would look; its lines come last, and so win
DS_ENV_FILE=$(mktemp) && trap 'rm -f "$DS_ENV_FILE"' EXIT && export DS_ENV_FILE
{ echo "$values"; grep -hs = ~/"$own" "$own" || true; } >"$DS_ENV_FILE"
for argument in "${@:3}"; do
  argument=$(escape <<<"$argument") && [[ $argument == *' '* ]] || argument="\"${argument//\"/\\\"}\""
  arguments+=("$argument")
done

# Ranks only: the launcher's children; those of a host may have ended by then. With none on any host, nothing is lost with it.
launchers="^[^ ]+ -u -m deepspeed.launcher.launch .*--master_addr=$address --master_port=$port "
kill_ranks="pkill -P \"\$(pgrep -d, -f '$launchers')\" && echo stopped"
stop_ranks() { [[ $(pdsh -R ssh -w "$hosts" "$kill_ranks") == *stopped* ]] || kill -TERM "$1"; }
run_stoppable stop_ranks deepspeed --hostfile "$2" --force_multi --no_ssh_check \
  --master_addr "$address" --master_port "$port" --module pst_ds train "${arguments[@]}"
