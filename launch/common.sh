# Sourced by the other scripts: what every rank's environment holds, and a launcher that can be asked to stop.
# shellcheck shell=bash

# One thread per rank, or what Slurm gives each: spinning threads of many ranks on few cores cost a factor of ten.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Compile Triton kernels on each host's disk, since hundreds of ranks would compile in a shared home at once.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-$(id -u)}
# Keep freed memory in the process: glibc would otherwise fault every large temporary in anew.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1073741824}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1073741824}
# --help: the comment at the top of the script, without the lines for the shell and for Slurm.
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '/^#!\|^#SBATCH/d; /^#/!q; s/^# \{0,3\}//p' "$0"
  exit 0
fi

# refuse MESSAGE: bad input, exit code 2.
refuse() {
  echo "${0##*/}: $1; see --help" >&2
  exit 2
}

# need PROGRAM FIX: refuses when PROGRAM is not there.
need() { command -v "$1" >/dev/null || refuse "$1 is not on PATH; $2"; }

# run_stoppable STOP COMMAND...: COMMAND's exit code. A signal to end this script calls "STOP PID-OF-COMMAND", which is
# to signal the ranks alone: the launcher dies of USR1 and leaves them behind with exit code 0, and after TERM it kills
# them 30 seconds on and forgets their code. So it ignores USR1, and a process group of its own keeps Ctrl-C from it.
run_stoppable() {
  local stop=$1 pid
  shift
  set -m
  (trap '' USR1 && exec "$@") &
  pid=$!
  set +m
  # shellcheck disable=SC2064  # stop and pid are to be those of now
  trap "$stop $pid" HUP INT TERM USR1
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a signal ends wait early
  wait "$pid"
}
