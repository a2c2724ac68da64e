"""What `cloud/` asks of a cloud, with a cloud of two folders behind a recorder named gcloud."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLOUD = ROOT / "cloud"
TPU = CLOUD / "tpu.sh"
SCRIPTS = [TPU, CLOUD / "worker.sh", ROOT / ".ci" / "run"]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
WORKERS = ("0", "1")

needs_linux = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")

# A cloud in $CLOUD: `node` and `queue` hold states, workers/N is the home of worker N.
GCLOUD = r"""#!/bin/bash
# What a worker itself asks for.
[ "$1 $2" != "storage cp" ] || { echo "$4" > "$5/fetched"; exit; }
{ printf '%s\x1f' "$@"; printf '\x1e'; } >> "$CLOUD/log"
worker=0 command=
for word; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
  esac
done
[ "$worker" != all ] || worker='0 1'
tab=$'\t'
provide() {
  echo READY > "$CLOUD/node"
  mkdir -p "$CLOUD"/workers/{0,1}
}
discard() {
  rm -rf "$CLOUD"/{node,workers}
}
[ "$1 $2" = "compute tpus" ] || exit 64
case "$3 $4" in
"tpu-vm create")
  [ ! -e "$CLOUD/no-capacity" ] || { rm "$CLOUD/no-capacity"; exit 1; }
  [ ! -e "$CLOUD/node" ] || exit 1
  provide ;;
"tpu-vm delete")
  discard ;;
"tpu-vm list")
  [ ! -e "$CLOUD/no-answer" ] || { echo "ERROR: no credentials" >&2; exit 1; }
  echo "other${tab}PREEMPTED"
  [ ! -e "$CLOUD/node" ] || echo "slice${tab}$(cat "$CLOUD/node")" ;;
"queued-resources create")
  [ ! -e "$CLOUD/queue" ] || exit 1
  echo WAITING_FOR_RESOURCES > "$CLOUD/queue" ;;
"queued-resources delete")
  rm "$CLOUD/queue"
  discard ;;
"queued-resources list")
  [ -e "$CLOUD/queue" ] || exit 0
  echo "slice${tab}$(cat "$CLOUD/queue")"
  # Only a request that waits moves on.
  if [ -s "$CLOUD/queue-next" ] && grep -q '^WAIT\|^PROV' "$CLOUD/queue"; then
    head -n 1 "$CLOUD/queue-next" > "$CLOUD/queue"
    sed -i 1d "$CLOUD/queue-next"
    [ "$(cat "$CLOUD/queue")" != ACTIVE ] || provide
  fi ;;
"tpu-vm scp")
  [ "$(cat "$CLOUD/node")" = READY ] || exit 1
  for w in $worker; do cp "$5" "$CLOUD/workers/$w/" || exit 1; done ;;
"tpu-vm ssh")
  [ "$(cat "$CLOUD/node" 2> /dev/null)" = READY ] || exit 1
  code=0
  for w in $worker; do
    # As sshd does: a login shell at home, given the command as one string.
    (cd "$CLOUD/workers/$w" && HOME=$PWD exec bash -c "$command") || code=$?
  done
  exit $code ;;
*)
  exit 64 ;;
esac
"""

# Installs the recorder below instead of packages.
UV = r"""#!/bin/bash
printf '%s\x1f' "$@" >> "$HOME/uv.log"
case $1 in
  venv) mkdir -p venv/bin ;;
  pip) cp "$CLOUD/vlae_jax" venv/bin/vlae_jax ;;
esac
"""

# The trainer: appends its arguments to trained-N and does what line N of script[-N] says.
VLAE_JAX = r"""#!/bin/bash
worker=${HOME##*/}
log=$CLOUD/trained-$worker
{ printf '%s\x1f' "$@"; printf '\x1e'; } >> "$log"
turn=$(tr -dc '\036' < "$log" | wc -c)
script=$CLOUD/script-$worker
[ -e "$script" ] || script=$CLOUD/script
line=$(sed -n "${turn}p" "$script")
echo "training: ${line:-exit 0}"
wait_for_term() {
  trap 'exit 143' TERM
  for _ in {1..300}; do sleep 0.1; done
}
preempt() {
  [ "$worker" = 0 ] || exit 143
  echo "$1" > "$CLOUD/node"
  [ ! -e "$CLOUD/queue" ] || { rm "$CLOUD/node"; echo SUSPENDED > "$CLOUD/queue"; }
  exit 143
}
eval "${line:-exit 0}"
"""


def records(path: Path) -> list[list[str]]:
    """What a recorder has written."""
    if not path.exists():
        return []
    return [record.split("\x1f")[:-1] for record in path.read_text().split("\x1e")[:-1]]


class Cloud:
    """A zone with one slice of two workers at most, and a PATH that leads there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cloud"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.folder.mkdir()
        for path, text in (
            (self.bin / "gcloud", GCLOUD),
            (self.bin / "uv", UV),
            (self.folder / "vlae_jax", VLAE_JAX),
        ):
            path.write_text(text)
            path.chmod(0o755)
        self.script("exit 0")

    def script(self, *turns: str, worker: str = "") -> None:
        """What the trainer does in each of its runs, on all workers or on one."""
        name = f"script-{worker}" if worker else "script"
        (self.folder / name).write_text("".join(f"{turn}\n" for turn in turns))

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CLOUD": str(self.folder),
            "HOME": str(self.folder),
            "GRACE": "2",
        }

    def tpu(self, command: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        place = ["--name=slice", "--zone", "us-west4-a", "--poll=0", "--pause=0"]
        kind = ["--type", "v5litepod-8"] if command in ("create", "supervise") else []
        return self.bare(command, *place, *kind, *arguments, **more)

    def bare(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(TPU), *arguments],
            env=self.environment() | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self, *verbs: str) -> list[list[str]]:
        """The calls of gcloud, or those of some of its verbs, such as create."""
        made = records(self.folder / "log")
        return [call for call in made if not verbs or call[3] in verbs]

    def trained(self, worker: str = "0") -> list[list[str]]:
        """Arguments of each `vlae_jax` on a worker."""
        return records(self.folder / f"trained-{worker}")

    def started(self) -> int:
        return len([call for call in self.calls("ssh") if "worker.sh start" in " ".join(call)])

    def states(self) -> set[str]:
        """What status says of the workers."""
        done = self.tpu("status")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("vlae_jax-state ") == len(WORKERS)
        return set(re.findall(r"^vlae_jax-state \S+ (.*)$", done.stdout, re.MULTILINE))

    def wait(self, state: str) -> None:
        """Until all workers are in this state."""
        for _ in range(200):
            if self.states() == {state}:
                return
            time.sleep(0.05)
        raise AssertionError(self.states())

    def ready(self, installed: Path) -> None:
        """As after create and setup."""
        (self.folder / "node").write_text("READY")
        shutil.copytree(installed, self.folder / "workers", dirs_exist_ok=True)

    def end(self) -> None:
        """Kill whatever trainer a test has left behind."""
        for path in self.folder.glob("workers/*/vlae_jax/run/pid"):
            try:
                os.kill(int(path.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                continue


@pytest.fixture
def cloud(tmp_path: Path):
    made = Cloud(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workers' homes after create and setup."""
    made = Cloud(tmp_path_factory.mktemp("installed"))
    for command in ("create", "setup"):
        done = made.tpu(command)
        assert done.returncode == 0, done.stderr
    return made.folder / "workers"


BUCKET_RUN = ("--dataset", "mnist", "--run-dir", "gs://bucket/run")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    beside = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck comes with the extra `lint`")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_help_names_every_command_and_option():
    shown = subprocess.run(["bash", str(TPU), "--help"], capture_output=True, text=True, check=True)
    text = TPU.read_text()
    (commands,) = re.findall(r"^  (create \| .*)\) ;;$", text, re.MULTILINE)
    for command in commands.split(" | "):
        assert re.search(rf"^  {command} ", shown.stdout, re.MULTILINE), command
    parser = text[text.index("while [ $# -gt 0 ]") :]
    parser = parser[: parser.index("\ndone")]
    options = set(re.findall(r"(--[a-z-]+)\b", parser)) - {"--"}
    assert len(options) > 15
    for option in options:
        assert re.search(rf"^  {option}\b", shown.stdout, re.MULTILINE), option


PLACE = ("--name=slice", "--zone=us-west4-a")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "name a command"),
        (("lunch", *PLACE), "unknown command 'lunch'"),
        (("create", "--zone=z", "--type=v6e-8"), "no slice named: give --name NAME"),
        (("create", "--name=slice", "--type=v6e-8"), "no zone: give --zone ZONE"),
        (("create", *PLACE), "no accelerator type: give --type TYPE"),
        (("create", *PLACE, "--type=v9-8"), "no runtime known for v9-8"),
        (("supervise", *PLACE), "no accelerator type"),
        (("create", "--name"), "--name needs a value"),
        (("create", *PLACE, "--sport"), "--sport needs a value"),
        (("create", *PLACE, "--sport=1"), "unknown option --sport"),
        (("run", *PLACE, "mnist"), "arguments of vlae_jax train go after --: mnist"),
        (("delete", *PLACE, "--", "mnist"), "delete takes no arguments"),
        (("supervise", *PLACE, "--type=v6e-8", "--attempts=many", "--"), "a whole number"),
        (("supervise", *PLACE, "--type=v6e-8", "--", "--run-dir", "runs/a"), "--run-dir gs://"),
        (("supervise", *PLACE, "--type=v6e-8", "--", *BUCKET_RUN, "--overwrite"), "--overwrite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistake_is_refused_in_one_line(cloud, arguments, complaint):
    done = cloud.bare(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tpu.sh: error: ")
    assert complaint in line
    assert done.stdout == ""
    assert cloud.calls() == []


def test_missing_gcloud_is_said(cloud):
    (cloud.bin / "gcloud").unlink()
    for tool in ("bash", "dirname", "date"):
        (cloud.bin / tool).symlink_to(shutil.which(tool))
    done = cloud.bare("status", *PLACE, PATH=str(cloud.bin))
    assert done.returncode == 2
    assert "gcloud is not on the PATH" in done.stderr


AWKWARD = (
    '--run-dir=gs://bucket/it\'s a "run"',
    "--dataset",
    "",
    "two  spaces ",
    "$HOME `id` $(id) \\ * ~ ; & | > < # !",
    "two\nlines",
    "ünïcode",
    "-",
)


@needs_linux
@pytest.mark.parametrize(
    "command",
    [
        ("create",),
        ("create", "--spot", "--create-option=--network=a b", "--project", "my-project"),
        ("create", "--queued", "--create-option", "--valid-until-duration=6h"),
        ("setup",),
        ("setup", "--release=0.1.0", "--extras=train,tpu", "--data", "gs://bucket/data/*.npz"),
        ("run", "--ssh-option=--internal-ip", "--", *AWKWARD),
        ("logs", "--worker=1"),
        ("status",),
        ("status", "--queued"),
        ("stop",),
        ("delete",),
        ("delete", "--queued"),
    ],
    ids=" ".join,
)
def test_a_dry_run_prints_what_is_run_and_can_be_pasted(cloud, installed, command):
    """Printed, run, and pasted into a shell: three times the same calls of gcloud."""
    verb, *options = command

    def prepare() -> None:
        cloud.end()
        shutil.rmtree(cloud.folder / "workers", ignore_errors=True)
        for name in ("node", "queue"):
            (cloud.folder / name).unlink(missing_ok=True)
        if verb != "create":
            for name, state in (("node", "READY"), ("queue", "ACTIVE")):
                (cloud.folder / name).write_text(state)
            for worker in WORKERS:
                (cloud.folder / "workers" / worker).mkdir(parents=True)
        (cloud.folder / "queue-next").write_text("ACTIVE\n" if "--queued" in options else "")
        if verb in ("run", "logs", "status", "stop"):
            cloud.ready(installed)
        for path in cloud.folder.glob("workers/*/vlae_jax/run"):
            (path / "log").write_text("training\n")
        (cloud.folder / "log").unlink(missing_ok=True)

    prepare()
    dry = cloud.tpu(verb, "--dry-run", *options)
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    printed = [shlex.split(line) for line in _commands(dry.stdout)]
    printed = [words[1:] for words in printed if words[0] == "gcloud"]
    assert printed

    prepare()
    real = cloud.tpu(verb, *options)
    assert real.returncode == 0, real.stderr
    # While a request waits, its state is asked for again.
    assert _without_repeats(cloud.calls()) == printed

    prepare()
    pasted = subprocess.run(
        ["bash", "-euc", dry.stdout],
        env=cloud.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert pasted.returncode == 0, pasted.stderr
    assert cloud.calls() == printed


def _commands(text: str) -> list[str]:
    """Lines of a shell script, joined where a quotation spans several."""
    joined: list[str] = []
    for line in text.splitlines():
        if joined and joined[-1].replace("'\\''", "").count("'") % 2:
            joined[-1] += "\n" + line
        else:
            joined.append(line)
    return joined


def _without_repeats(calls: list[list[str]]) -> list[list[str]]:
    return [call for call, before in zip(calls, [[], *calls], strict=False) if call != before]


@needs_linux
def test_arguments_reach_every_worker_as_they_were_typed(cloud, installed):
    cloud.ready(installed)
    done = cloud.tpu("run", "--", *AWKWARD)
    assert done.returncode == 0, done.stderr
    cloud.wait("exited 0")
    for worker in WORKERS:
        assert cloud.trained(worker) == [["train", *AWKWARD]]


@needs_linux
def test_setup_installs_this_source_or_a_release_at_the_pinned_versions(cloud, installed):
    cloud.ready(installed)
    home = cloud.folder / "workers" / "1"
    source = home / "vlae_jax" / "source"
    for name in ("pyproject.toml", "constraints.txt", "src/vlae_jax/commands/main.py"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    words = (home / "uv.log").read_text().split("\x1f")
    assert words[-3] == "vlae-jax"
    assert words[-2].endswith("/workers/1/vlae_jax/source[train,tpu,gcs]")
    assert words[words.index("--constraint") + 1] == "source/constraints.txt"
    data = "gs://bucket/data/*.npz"
    done = cloud.tpu("setup", "--release", "0.1.0", "--extras=train", "--data", data)
    assert done.returncode == 0, done.stderr
    assert (home / "vlae_jax/data/fetched").read_text() == f"{data}\n"
    assert (home / "uv.log").read_text().endswith("\x1fvlae-jax[train]==0.1.0\x1f")


@needs_linux
def test_a_run_outlives_its_connection_and_is_not_started_twice(cloud, installed):
    cloud.script("wait_for_term")
    cloud.ready(installed)
    assert "not installed" not in cloud.tpu("run", "--", "--seed=1").stderr
    assert cloud.states() == {"running"}
    again = cloud.tpu("run", "--", "--seed=2")
    assert again.returncode == 2
    assert "is training already; stop it first" in again.stderr
    supervised = cloud.tpu("supervise", "--", *BUCKET_RUN)
    assert supervised.returncode == 2
    assert "another run goes on on slice" in supervised.stderr
    assert cloud.tpu("stop").returncode == 0
    assert cloud.states() == {"exited 143"}
    assert cloud.trained() == [["train", "--seed=1"]]
    log = cloud.tpu("logs").stdout
    assert "training: wait_for_term" in log and "exit code 143" in log


@needs_linux
def test_run_needs_setup(cloud):
    assert cloud.tpu("create").returncode == 0
    assert cloud.tpu("run", "--", "--seed=1").returncode != 0
    assert cloud.trained() == []


RUN = ["train", *BUCKET_RUN, "--resume-if-there"]


@needs_linux
def test_supervise_makes_a_preempted_slice_anew_and_continues(cloud):
    cloud.script("preempt PREEMPTED", "preempt TERMINATED", "exit 0")
    done = cloud.tpu("supervise", "--spot", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    made = cloud.calls("create", "delete")
    assert [call[3] for call in made] == ["create", "delete", "create", "delete", "create"]
    assert all("--spot" in call for call in made[::2])
    assert len(cloud.calls("scp")) == 3
    for worker in WORKERS:
        assert cloud.trained(worker) == [RUN] * 3


@needs_linux
def test_supervise_asks_the_queue_again_after_a_failed_request_and_a_preemption(cloud):
    (cloud.folder / "queue-next").write_text("PROVISIONING\nFAILED\nACTIVE\nACTIVE\n")
    cloud.script("preempt PREEMPTED", "exit 0")
    done = cloud.tpu("supervise", "--queued", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    made = cloud.calls("create", "delete")
    assert [call[2] for call in made] == ["queued-resources"] * 5
    assert [call[3] for call in made] == ["create", "delete", "create", "delete", "create"]
    assert all("--force" in call for call in made[1::2])
    assert cloud.trained() == [RUN] * 2


@needs_linux
@pytest.mark.parametrize("code", [75, 134])
def test_supervise_continues_on_the_same_slice_after_a_lost_peer(cloud, code):
    cloud.script(f"exit {code}", "exit 0")
    done = cloud.tpu("supervise", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("create")) == len(cloud.calls("scp")) == 1
    assert cloud.calls("delete") == []
    assert cloud.trained() == [RUN] * 2


@needs_linux
def test_a_run_is_not_lost_before_its_exit_code_is_written(cloud):
    slow = cloud.bin / "mv"
    slow.write_text(
        f'#!/bin/bash\n[ "$1" != run/exit.new ] || sleep 0.5\nexec {shutil.which("mv")} "$@"'
    )
    slow.chmod(0o755)
    done = cloud.tpu("supervise", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.trained() == [RUN]


@needs_linux
@pytest.mark.parametrize(("code", "others"), [(1, 143), (2, 143), (1, 0)])
def test_supervise_does_not_repeat_what_would_fail_again(cloud, code, others):
    """Wherever the code comes from: the other worker only sees that its peer is gone."""
    cloud.script(f"exit {code}", worker="1")
    cloud.script(f"exit {others}", worker="0")
    done = cloud.tpu("supervise", "--", *BUCKET_RUN)
    assert done.returncode == code, done.stderr
    assert cloud.trained("1") == [RUN]
    # The next supervise is a new try.
    assert cloud.tpu("supervise", "--", *BUCKET_RUN).returncode == 0
    assert len(cloud.trained("1")) == 2


@needs_linux
def test_supervise_gives_up_after_its_attempts(cloud):
    cloud.script(*["exit 75"] * 9)
    done = cloud.tpu("supervise", "--attempts=3", "--", *BUCKET_RUN)
    assert done.returncode == 75
    assert "gave up after 3 attempts" in done.stderr
    assert cloud.trained() == [RUN] * 3


@needs_linux
def test_supervise_waits_for_capacity(cloud):
    (cloud.folder / "no-capacity").touch()
    done = cloud.tpu("supervise", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    assert len(cloud.calls("create")) == 2
    assert cloud.trained() == [RUN]


def test_supervise_pauses_between_attempts(cloud):
    (cloud.folder / "no-answer").touch()
    (cloud.bin / "sleep").write_text('#!/bin/sh\necho "$@" >> "$CLOUD/slept"\n')
    (cloud.bin / "sleep").chmod(0o755)
    done = cloud.tpu("supervise", "--attempts=3", "--pause=77", "--", *BUCKET_RUN)
    assert done.returncode == 75
    assert (cloud.folder / "slept").read_text().split() == ["77", "77"]
    # A cloud that does not answer is no reason to make or to delete anything.
    assert {call[3] for call in cloud.calls()} == {"list"}


@needs_linux
def test_supervise_adopts_a_run_that_goes_on(cloud, installed):
    """As after the supervisor itself was ended; a finished one is not repeated either."""
    cloud.script("sleep 0.7; exit 0")
    cloud.ready(installed)
    assert cloud.tpu("run", "--", *BUCKET_RUN).returncode == 0
    for _ in range(2):
        done = cloud.tpu("supervise", "--", *BUCKET_RUN)
        assert done.returncode == 0, done.stderr
    assert cloud.started() == 1
    assert cloud.trained() == [["train", *BUCKET_RUN]]
    # Another run on the same slice is another run.
    assert cloud.tpu("supervise", "--", *BUCKET_RUN, "--seed=1").returncode == 0
    assert cloud.trained()[1:] == [["train", *BUCKET_RUN, "--seed=1", "--resume-if-there"]]


@needs_linux
def test_supervise_stops_workers_that_do_not_notice_a_lost_peer(cloud):
    cloud.script("exit 75", "exit 0", worker="0")
    cloud.script("wait_for_term", "exit 0", worker="1")
    done = cloud.tpu("supervise", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    assert "stopping the workers that are left" in done.stderr
    assert len(cloud.calls("create")) == 1
    assert cloud.trained("1") == [RUN] * 2


@needs_linux
def test_supervise_makes_a_slice_anew_that_does_not_answer(cloud):
    # READY as far as the service says, but no worker can be reached.
    (cloud.folder / "node").write_text("READY")
    done = cloud.tpu("supervise", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    assert [call[3] for call in cloud.calls("create", "delete")] == ["delete", "create"]
    assert cloud.trained() == [RUN]


def test_a_dry_supervise_shows_one_attempt_from_nothing(cloud):
    done = cloud.tpu("supervise", "--dry-run", "--queued", "--", *BUCKET_RUN)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    verbs = [" ".join(words[3:5]) for words in lines if words[0] == "gcloud"]
    assert verbs == [
        "tpu-vm list",
        "queued-resources list",
        "queued-resources create",
        "queued-resources list",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "tpu-vm ssh",
    ]
    assert cloud.calls() == []


# ------------------------------------------------------------------------- files for clusters

JOBSET = yaml.safe_load((CLOUD / "gke-jobset.yaml").read_text())
SCHEMA = json.loads(
    (Path(__file__).parents[1] / "fixtures/jobset_v1alpha2.schema.json").read_text()
)


def _replicated() -> tuple[dict, dict, dict]:
    """The one Job of the set, its pods and their one container."""
    (replicated,) = JOBSET["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


def test_jobset_has_the_fields_of_its_api():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(JOBSET, SCHEMA)
    wrong = json.loads(json.dumps(JOBSET))
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(wrong, SCHEMA)


def test_jobset_holds_a_valid_job():
    import kubernetes_validate

    job, _, _ = _replicated()
    document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job}
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(document, version, strict=True)
    job = json.loads(json.dumps(document))
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


def test_jobset_fills_its_slice_with_one_pod_a_host():
    job, pod, container = _replicated()
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == per_host
    assert job["completions"] == job["parallelism"] == chips // per_host
    assert job["completionMode"] == "Indexed"


def test_jobset_restarts_as_a_whole_and_never_after_exit_codes_1_and_2():
    job, pod, container = _replicated()
    # Conditions that the API has for a policy on exit codes.
    assert pod["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1, 2]},
    }
    policy = JOBSET["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(r["action"], r["onJobFailureReasons"]) for r in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]


def test_jobset_can_be_continued_and_reads_the_data_it_fetches():
    _, pod, container = _replicated()
    assert container["args"][0] == "train"
    assert "--resume-if-there" in container["args"]
    assert any(word.startswith("--run-dir=gs://BUCKET/") for word in container["args"])
    (data,) = pod["initContainers"]
    (mount,) = container["volumeMounts"]
    assert data["command"][-1].rstrip("/") == mount["mountPath"] == "/data"
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["VLAE_JAX_CACHE"] == "/data"
    assert environment["JAX_PLATFORMS"] == "tpu,cpu"


def test_dockerfile_copies_what_is_there_and_installs_extras_that_exist():
    text = (CLOUD / "Dockerfile").read_text().replace("\\\n", " ")
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    allowed = (ROOT / ".dockerignore").read_text().split("\n")
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path}" in allowed, path
    # What the build backend reads must be among them.
    assert {"pyproject.toml", "README.md", "LICENSE", "src"} <= set(copied)
    assert "constraints.txt" in copied and "-c constraints.txt" in text
    named = {extra for line in re.findall(r'extras="?([a-z,]+)', text) for extra in line.split(",")}
    assert named - {""} <= set(EXTRAS)
    assert {"cpu", "cuda", "tpu"} <= set(re.findall(r"\b(cpu|cuda|tpu)\b(?=\)| \|)", text))
    assert re.search(r"^USER 1000$", text, re.M)


def test_scripts_and_skypilot_install_extras_that_exist():
    (default,) = re.findall(r"extras=(\S+) data=", TPU.read_text())
    task = yaml.safe_load((CLOUD / "skypilot.yaml").read_text())
    (task_extras,) = re.findall(r"'\.\[(\S+)\]'", task["setup"])
    assert set(default.split(",")) | set(task_extras.split(",")) <= set(EXTRAS)


def test_the_guide_names_what_exists():
    """Every line of tpu.sh in it is understood; every file is there."""
    text = (ROOT / "docs/tpu.md").read_text() + (CLOUD / "README.md").read_text()
    for path in re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / "docs/tpu.md").read_text()):
        assert (ROOT / "docs" / path).exists(), path
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [line for line in lines if line.startswith("cloud/tpu.sh ")]
    assert len(calls) >= 6
    place = {"TPU_NAME": "slice", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-16"}
    for call in calls:
        words = shlex.split(call, comments=True)
        done = subprocess.run(
            ["bash", str(TPU), words[1], "--dry-run", *words[2:]],
            env={"PATH": os.environ["PATH"], **place},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{call}: {done.stderr}"
