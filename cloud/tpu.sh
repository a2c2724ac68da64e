#!/usr/bin/env bash
# `vlae_jax train` on a Cloud TPU slice, by gcloud alone. docs/tpu.md tells how.
set -euo pipefail

usage() {
  cat << 'END'
Usage: cloud/tpu.sh COMMAND --name NAME --zone ZONE [OPTION ...] [-- ARGUMENT ...]

Commands:
  create      make the slice, or queue for it, and wait until it is there
  setup       install vlae_jax on all workers
  run         start `vlae_jax train ARGUMENT ...` on all workers, detached
  logs        follow the log of one worker
  status      the state of the slice, and of the run on each worker
  stop        end the run with SIGTERM: it saves a checkpoint
  supervise   create, set up and run; after a preemption or a lost worker again, with
              --resume-if-there, until the run is done; leaves the slice there
  delete      delete the slice

Options:
  --name NAME            name of the slice ($TPU_NAME)
  --zone ZONE            its zone ($TPU_ZONE)
  --type TYPE            accelerator type, such as v5litepod-16 ($TPU_TYPE); create, supervise
  --project PROJECT      by default gcloud's
  --runtime VERSION      TPU software version; by default the one for TYPE
  --queued               by queued-resources; give it to delete, status and supervise as well
  --spot                 as Spot VMs: cheaper, and taken away at any time
  --create-option FLAG   one more flag for gcloud's create; may be repeated
  --ssh-option FLAG      one more flag for gcloud's ssh and scp; may be repeated
  --release VERSION      install this release of vlae-jax instead of the source around this script
  --extras LIST          extras to install (train,tpu,gcs)
  --data gs://URL        copy these files into the data cache of each worker
  --worker N             whose log to follow (0)
  --attempts N           supervise: give up after so many (50)
  --pause SECONDS        supervise: between two attempts (60)
  --poll SECONDS         between two looks at the state (30)
  --dry-run              print the commands, ready to be pasted, and run none
  --help                 show this text

ARGUMENTs are those of `vlae_jax train`; supervise needs a --run-dir that starts with gs://.

Exit codes: 0 done; 2 wrong use, of this script or of vlae_jax train; 75 supervise gave up, and
may be started again; otherwise that of the command that failed, 1 for a failed run.
END
}

die() {
  printf 'tpu.sh: error: %s\n' "$1" >&2
  exit 2
}

say() { printf 'tpu.sh: %s %s\n' "$(date +%T)" "$1" >&2; }

# ------------------------------------------------------------------------ running commands

# Words as a shell reads them back.
quote() {
  local word line='' mark="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$mark/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Standard input stays ours: ssh would read it.
do_run() {
  if [ "$dry_run" = yes ]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    "$@" < /dev/null 3>&-
  fi
}

# What a command prints; in a dry run the command is shown and ANSWER stands for its output.
query() {
  local answer=$1
  shift
  do_run "$@" || return 1
  [ "$dry_run" = no ] || printf '%s\n' "$answer"
}

gcloud_tpus() {
  local group=$1 verb=$2
  shift 2
  do_run gcloud compute tpus "$group" "$verb" "$@" "${place[@]}"
}

# COMMAND on one worker or, concurrently, on all.
on_workers() {
  gcloud_tpus tpu-vm ssh "$name" --worker="$1" --command="$2" ${ssh_options[@]+"${ssh_options[@]}"}
}

worker_script=vlae_jax/source/cloud/worker.sh

# ------------------------------------------------------------------------------- the slice

create() {
  local flags=(--accelerator-type="$type")
  [ "$spot" = no ] || flags+=(--spot)
  flags+=(${create_options[@]+"${create_options[@]}"})
  if [ "$queued" = yes ]; then
    gcloud_tpus queued-resources create "$name" --node-id="$name" --runtime-version="$runtime" \
      "${flags[@]}" && wait_for_queue
  else
    gcloud_tpus tpu-vm create "$name" --version="$runtime" "${flags[@]}"
  fi
}

delete() {
  if [ "$queued" = yes ]; then
    gcloud_tpus queued-resources delete "$name" --force --quiet
  else
    gcloud_tpus tpu-vm delete "$name" --quiet
  fi
}

# State of the node, or nothing when there is none; fails when gcloud does.
node_state() {
  local rows
  rows=$(query "$1" gcloud compute tpus tpu-vm list --format='value(name.basename(),state)' \
    "${place[@]}") || return 1
  awk -v name="$name" '$1 == name { print $2 }' <<< "$rows"
}

queue_state() {
  local rows
  rows=$(query "$1" gcloud compute tpus queued-resources list \
    --format='value(name.basename(),state.state)' "${place[@]}") || return 1
  awk -v name="$name" '$1 == name { print $2 }' <<< "$rows"
}

# However long the queue is: `--create-option --valid-until-duration=6h` bounds it.
wait_for_queue() {
  local state last='' failures=0
  while :; do
    if state=$(queue_state "$name ACTIVE"); then
      failures=0
    else
      state=unreadable
      failures=$((failures + 1))
    fi
    [ "$state" = "$last" ] || say "request $name: ${state:-gone}"
    last=$state
    case $state in
      ACTIVE) return 0 ;;
      '' | FAILED | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    [ "$failures" -lt 10 ] || return 1
    sleep "$poll"
  done
}

# For supervise: a slice that is READY, whatever was there before. Sets `fresh` when it is new.
ensure_slice() {
  local state request
  fresh=no
  while :; do
    state=$(node_state '') || return 1
    [ -z "$state" ] || [ "$state" = READY ] || say "slice $name: $state"
    case $state in
      READY)
        [ "$discard" = yes ] || return 0
        delete || return 1
        ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | STOPPING | DELETING | HIDING | \
        UNHIDING)
        sleep "$poll"
        continue
        ;;
      '')
        request=
        [ "$queued" = no ] || request=$(queue_state '') || return 1
        case $request in
          '') ;;
          DELETING | SUSPENDING)
            sleep "$poll"
            continue
            ;;
          FAILED | SUSPENDED | ACTIVE) delete || return 1 ;;
          *)
            wait_for_queue || return 1
            continue
            ;;
        esac
        ;;
      *) delete || return 1 ;;
    esac
    discard=no
    say "creating $name"
    create || return 1
    fresh=yes
    return 0
  done
}

# ----------------------------------------------------------------------------- the workers

setup() {
  local archive=$root/build/vlae_jax-source.tar.gz unpack install
  do_run mkdir -p "$root/build" || return 1
  do_run tar -C "$root" --exclude=__pycache__ -czf "$archive" \
    pyproject.toml constraints.txt README.md LICENSE src cloud || return 1
  gcloud_tpus tpu-vm scp "$archive" "$name:" --worker=all \
    ${ssh_options[@]+"${ssh_options[@]}"} || return 1
  unpack='rm -rf vlae_jax/source && mkdir -p vlae_jax/source'
  unpack+=' && tar -xzf vlae_jax-source.tar.gz -C vlae_jax/source'
  install=$(quote bash "$worker_script" install "$extras" "$release" "$data")
  on_workers all "$unpack && $install"
}

run() { on_workers all "$(quote bash "$worker_script" start "$@")"; }

stop() { on_workers all "bash $worker_script stop"; }

# One word for all workers, in `state`: absent, idle, busy, running, partial, unreachable, or
# `exited CODE`: 0 only when every worker says so; wrong use and a failed run before a lost peer.
training_state() {
  local ask lines answer="vlae_jax-state worker exited 0"
  ask="$(quote bash "$worker_script" state "$@") || echo vlae_jax-state worker absent"
  if ! lines=$(query "$answer" gcloud compute tpus tpu-vm ssh "$name" --worker=all \
    --command="$ask" ${ssh_options[@]+"${ssh_options[@]}"} "${place[@]}"); then
    state=unreachable
    return
  fi
  state=$(awk '
    $1 == "vlae_jax-state" { seen[$3]++; workers++; if ($3 == "exited") codes[$4]++ }
    END {
      if (!workers) print "unreachable"
      else if (seen["absent"]) print "absent"
      else if (seen["busy"]) print "busy"
      else if (seen["running"]) print seen["running"] == workers ? "running" : "partial"
      else if (2 in codes) print "exited 2"
      else if (1 in codes) print "exited 1"
      else if (codes[0] == workers) print "exited 0"
      else if (seen["idle"]) print "idle"
      else {
        delete codes[0]
        for (code in codes) { print "exited " code; exit }
        print "exited 75"
      }
    }' <<< "$lines")
}

# Until the run has ended or the slice is gone; leaves what happened in `state`.
watch() {
  local node last='' strange=0
  while :; do
    training_state "$@"
    [ "$state" = "$last" ] || say "run: $state"
    last=$state
    case $state in
      running) strange=0 ;;
      # Workers notice that one of them is gone and end by themselves; if they do not, they are
      # stopped. Nor need a slice that does not answer be gone.
      partial | unreachable)
        strange=$((strange + 1))
        node=$(node_state "$name READY") || node=unreadable
        case $node in
          READY | unreadable | CREATING | STARTING | RESTARTING | REPAIRING) ;;
          *)
            state="slice ${node:-gone}"
            return
            ;;
        esac
        if [ "$strange" -ge "$patience" ]; then
          [ "$state" = partial ] || return 0
          say 'stopping the workers that are left'
          stop || true
          strange=0
        fi
        ;;
      *) return ;;
    esac
    sleep "$poll"
  done
}

supervise() {
  local attempt
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    [ "$attempt" = 1 ] || sleep "$pause"
    say "attempt $attempt of $attempts"
    ensure_slice || { say "no slice"; continue; }
    state=absent
    [ "$fresh" = yes ] || training_state "$@"
    case $state in
      busy) die "another run goes on on $name; end it with stop" ;;
      'exited 0') ;;
      running | partial) ;;
      unreachable) ;;
      *)
        if [ "$state" = absent ]; then
          setup || { say 'setup failed'; continue; }
        fi
        run "$@" --resume-if-there || { say 'the start failed'; stop || true; continue; }
        ;;
    esac
    watch "$@"
    case $state in
      'exited 0')
        say 'the run is done; the slice is still there, and still costs: delete it'
        return 0
        ;;
      'exited 1' | 'exited 2')
        say "the run failed, and would again: see the log; the slice is still there"
        return "${state#exited }"
        ;;
      unreachable)
        say "$name does not answer; it will be made anew"
        discard=yes
        ;;
    esac
    say "$state: to be continued"
  done
  say "gave up after $attempts attempts"
  return 75
}

status() {
  local state request
  state=$(node_state "$name READY") || return 1
  [ "$dry_run" = yes ] || echo "slice $name: ${state:-there is none}"
  if [ "$queued" = yes ]; then
    request=$(queue_state "$name ACTIVE") || return 1
    [ "$dry_run" = yes ] || echo "request $name: ${request:-there is none}"
  fi
  [ "$state" != READY ] || on_workers all "bash $worker_script state"
}

# ------------------------------------------------------------------------------- arguments

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} project='' runtime=''
queued=no spot=no dry_run=no release='' extras=train,tpu,gcs data='' worker=0
attempts=50 pause=60 poll=30
create_options=() ssh_options=()
# Looks at a slice that does not answer, or that lacks a worker, before something is done.
patience=10
discard=no

command=
while [ $# -gt 0 ]; do
  option=$1
  shift
  case $option in
    --) break ;;
    --help | -h)
      usage
      exit 0
      ;;
    --queued | --spot | --dry-run)
      option=${option#--}
      printf -v "${option//-/_}" yes
      continue
      ;;
    --*=*)
      value=${option#*=}
      option=${option%%=*}
      ;;
    --*)
      [ $# -gt 0 ] || die "$option needs a value"
      value=$1
      shift
      ;;
    *)
      [ -z "$command" ] || die "arguments of vlae_jax train go after --: $option"
      command=$option
      continue
      ;;
  esac
  case $option in
    --name | --zone | --type | --project | --runtime | --release | --extras | --data | --worker)
      printf -v "${option#--}" %s "$value"
      ;;
    --attempts | --pause | --poll)
      case $value in '' | *[!0-9]*) die "$option needs a whole number, got '$value'" ;; esac
      printf -v "${option#--}" %s "$value"
      ;;
    --create-option) create_options+=("$value") ;;
    --ssh-option) ssh_options+=("$value") ;;
    *) die "unknown option $option; --help lists them" ;;
  esac
done

case $command in
  create | setup | run | logs | status | stop | supervise | delete) ;;
  '') die 'name a command: create, setup, run, logs, status, stop, supervise or delete' ;;
  *) die "unknown command '$command'; --help lists them" ;;
esac
[ -n "$name" ] || die 'no slice named: give --name NAME or set TPU_NAME'
[ -n "$zone" ] || die 'no zone: give --zone ZONE or set TPU_ZONE'
case $command in
  create | supervise)
    [ -n "$type" ] || die 'no accelerator type: give --type TYPE, such as v5litepod-16, or set TPU_TYPE'
    case ${runtime:+given}$type in
      given*) ;;
      v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *) die "no runtime known for $type: give --runtime VERSION" ;;
    esac
    ;;
esac
case $command in
  run | supervise) ;;
  *) [ $# = 0 ] || die "$command takes no arguments after --" ;;
esac
if [ "$command" = supervise ]; then
  on_bucket=no previous=
  for argument in "$@"; do
    case $argument in
      --resume | --resume-if-there | --overwrite)
        die "supervise continues the run by itself: leave $argument out" ;;
      --run-dir=gs://* | --runs-dir=gs://*) on_bucket=yes ;;
      gs://*) case $previous in --run-dir | --runs-dir) on_bucket=yes ;; esac ;;
    esac
    previous=$argument
  done
  [ "$on_bucket" = yes ] ||
    die 'a preempted slice takes its disks along: give -- --run-dir gs://BUCKET/RUN'
fi
[ "$dry_run" = yes ] || command -v gcloud > /dev/null ||
  die 'gcloud is not on the PATH: install the Google Cloud CLI'

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")
exec 3>&1
case $command in
  logs) on_workers "$worker" "bash $worker_script follow" ;;
  *) "$command" "$@" ;;
esac
