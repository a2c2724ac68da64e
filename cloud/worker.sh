#!/usr/bin/env bash
# The part of tpu.sh that runs on each worker of a slice, from ~/vlae_jax/source/cloud:
#   worker.sh install EXTRAS [VERSION [DATA]]   Python 3.12, a virtual environment, the data
#   worker.sh start ARGUMENT ...                `vlae_jax train ARGUMENT ...`, detached
#   worker.sh state [ARGUMENT ...]              one line: vlae_jax-state HOST WORD
#   worker.sh stop                              SIGTERM, and SIGKILL after $GRACE seconds
#   worker.sh follow                            the log, until the run ends
set -euo pipefail

source_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$source_folder/.."
mkdir -p run

# Restarts of one run differ in these options alone.
identity() {
  local word
  for word in "$@"; do
    case $word in --resume | --resume-if-there) ;; *) printf '%s\0' "$word" ;; esac
  done
}

# A process id outlives its process, across a reboot as well: ask what runs under it.
lives() {
  [ -s "$1" ] && [[ $(tr '\0' ' ' 2> /dev/null < "/proc/$(cat "$1")/cmdline") == *"$2"* ]]
}

# Until the exit code is written down: a run that has just ended is not lost.
is_running() { lives run/pid vlae_jax || lives run/keeper 'worker.sh child'; }

install_packages() {
  local extras=$1 version=${2:-} data=${3:-} target
  export PATH="$HOME/.local/bin:$PATH"
  rm -f run/installed
  # TPU VMs may come with Python 3.10; uv brings a newer one. Some pips must be told that --user is
  # meant, and older ones do not know the option.
  command -v uv > /dev/null || python3 -m pip install --quiet --user uv ||
    python3 -m pip install --quiet --user --break-system-packages uv
  target="${source_folder}[$extras]"
  [ -z "$version" ] || target="vlae-jax[$extras]==$version"
  uv venv --quiet --allow-existing --python 3.12 venv
  uv pip install --quiet --python venv/bin/python --constraint source/constraints.txt \
    --reinstall-package vlae-jax "$target"
  mkdir -p data
  [ -z "$data" ] || gcloud storage cp --recursive "$data" data/
  touch run/installed
  echo "$(hostname): installed"
}

start() {
  if is_running; then
    echo "worker.sh: error: $(hostname) is training already; stop it first" >&2
    exit 2
  fi
  if [ ! -e run/installed ]; then
    echo "worker.sh: error: vlae_jax is not installed on $(hostname); run setup first" >&2
    exit 2
  fi
  rm -f run/pid run/keeper run/exit
  identity "$@" > run/command
  setsid nohup bash "$source_folder/cloud/worker.sh" child "$@" < /dev/null >> run/log 2>&1 &
  local tries
  for ((tries = 0; tries < 100; tries++)); do
    [ -s run/pid ] && { echo "$(hostname): started"; return; }
    sleep 0.1
  done
  echo "worker.sh: error: $(hostname) did not start; see the log" >&2
  exit 1
}

# Runs in a session of its own, which outlives the ssh connection, and keeps the exit code.
child() {
  export PYTHONUNBUFFERED=1 VLAE_JAX_CACHE="$PWD/data"
  # With tpu named first, JAX stops when there is none instead of training on the CPU.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
  echo $$ > run/keeper
  echo "== $(date -u +%FT%TZ) $(hostname): vlae_jax train" "$@"
  local pid code=0
  "$PWD/venv/bin/vlae_jax" train "$@" &
  pid=$!
  # Under its name only when complete: someone may be reading.
  echo "$pid" > run/pid.new && mv run/pid.new run/pid
  wait "$pid" || code=$?
  echo "== $(date -u +%FT%TZ) $(hostname): exit code $code"
  echo "$code" > run/exit.new && mv run/exit.new run/exit
}

# With arguments, the state of the run that has them: a different one is `busy` while it goes on
# and `idle` once it has ended. `lost` ended without an exit code, as after a reboot; `absent`:
# nothing is installed.
state() {
  local word=idle same=yes
  [ $# = 0 ] || [ ! -e run/command ] || identity "$@" | cmp -s - run/command || same=no
  if is_running; then
    word=running
    [ "$same" = yes ] || word=busy
  elif [ -s run/exit ] && [ "$same" = yes ]; then
    word="exited $(cat run/exit)"
  elif [ -s run/pid ] && [ "$same" = yes ]; then
    word=lost
  elif [ ! -e run/installed ]; then
    word=absent
  fi
  echo "vlae_jax-state $(hostname) $word"
}

stop() {
  local seconds pid
  if is_running; then
    pid=$(cat run/pid)
    kill -TERM "$pid" || true
    for ((seconds = 0; seconds < ${GRACE:-120}; seconds++)); do
      is_running || break
      sleep 1
    done
    ! is_running || kill -KILL "$pid" || true
  fi
  echo "$(hostname): stopped"
}

follow() {
  if is_running; then
    tail -n 100 -F --pid="$(cat run/pid)" run/log
  else
    tail -n 100 run/log
  fi
}

command=${1:-}
shift || true
case $command in
  install) install_packages "$@" ;;
  start | child | state | stop | follow) "$command" "$@" ;;
  *)
    echo "worker.sh: error: unknown command '$command'" >&2
    exit 2
    ;;
esac
