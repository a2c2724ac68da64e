"""Many devices and many processes give the run that one gives, and fail in words."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from problems import flip_a_bit, run_in_subprocess

from vlae_jax.analysis.evaluation import measure
from vlae_jax.data.sets import load_dataset
from vlae_jax.errors import UserError
from vlae_jax.models.initial import initialize
from vlae_jax.models.saved import arrays_of
from vlae_jax.parallel.options import DistributedConfig
from vlae_jax.parallel.placement import Placement
from vlae_jax.parallel.processes import LOST_PEER
from vlae_jax.parallel.processes import start as join
from vlae_jax.runs.checkpoints import CheckpointInfo, Checkpoints
from vlae_jax.runs.config import (
    Config,
    EvaluationConfig,
    InferenceConfig,
    ModelConfig,
    TrainingConfig,
)
from vlae_jax.runs.folder import RunFolder
from vlae_jax.training.loop import fit
from vlae_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compile")


def small_config(method, microbatches=None):
    return Config(
        model=ModelConfig(latent=3, hidden=(64,)),
        inference=InferenceConfig(method=method, steps=2),
        training=TrainingConfig(
            epochs=20,
            learning_rate=1e-3,
            batch_size=128,
            microbatches=microbatches,
            modes="stored" if method == "vlae" else "encoder",
        ),
        evaluation=EvaluationConfig(
            40, "posterior", chunk_size=20, test_images=12, evaluation_batch=4
        ),
    )


STEPS_COMPARED = 100

# Eight virtual devices, in a process that is started with them


def losses(trainer, steps):
    state, arguments, found = trainer.init(), trainer.feed.arguments(0), []
    for _ in range(steps):
        state, loss = trainer.step(state, *next(arguments))
        found.append(float(loss))  # waits for it: see Placement.in_flight
    return state, np.array(found)


def relative(found, expected):
    return float(np.max(np.abs(found / expected - 1)))


def same_run():
    """Run by the test below, which reads what this prints."""
    jax.config.update("jax_disable_most_optimizations", True)
    # The widest layer has 64 x 64 weights, as many as it takes to be split.
    report = {"devices": jax.device_count()}
    dataset = load_dataset("digits")
    for method, microbatches in (("vae", None), ("vlae", 8)):
        trained = initialize(small_config(method, microbatches), dataset)
        reference, expected = losses(Trainer(trained, dataset, Placement.here()), STEPS_COMPARED)
        params = jax.device_get(reference.params)
        report["elements"] = sum(leaf.size for leaf in jax.tree.leaves(params))
        for name, shard in (("whole", False), ("sharded", True)):
            trainer = Trainer(trained, dataset, Placement.of(shard_parameters=shard))
            state, found = losses(trainer, STEPS_COMPARED)
            leaves = jax.tree.leaves(state.params)
            apart = jax.tree.map(
                lambda a, b: float(np.max(np.abs(a - b))),
                trainer.placement.whole(state.params),
                params,
            )
            report[f"{method} {name}"] = {
                "losses": relative(found, expected),
                "params": max(jax.tree.leaves(apart)),
                "elements on a device": sum(x.addressable_shards[0].data.size for x in leaves),
            }
    with tempfile.TemporaryDirectory() as folder:
        # Saved by eight that hold a part each, read by one.
        checkpoints = Checkpoints(Path(folder))
        trees = {"training": state._asdict()}
        checkpoints.save(STEPS_COMPARED, trees, CheckpointInfo(0.0, 0.0, None, 0.0, {}))
        checkpoints.wait()
        here = Trainer(trained, dataset, Placement.here()).init()
        read = checkpoints.restore_last(lambda info: {"training": here._asdict()}).trees
        same = jax.tree.map(np.array_equal, read["training"]["params"], params)
        report["restored"] = all(jax.tree.leaves(same))
    images = dataset.test[:12]
    trained = trained.with_params(params)
    alone = measure(trained, images)
    spread = measure(trained, images, placement=Placement.of())
    report["evaluation"] = {
        name: float(np.nanmax(np.abs(spread[name].astype(float) - alone[name])))
        for name in ("log_prob", "elbo", "kl", "ess")
    }
    print(json.dumps(report))


def in_eight_devices(call, timeout=300):
    output = run_in_subprocess(
        f"import parallel.test_processes as t; t.{call}()",
        timeout=timeout,
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        NPROC="32",
    )
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_train_and_evaluate_as_one_does():
    report = in_eight_devices("same_run")
    assert report["devices"] == 8 and report["restored"]
    for name in ("whole", "sharded"):
        assert report[f"vae {name}"]["losses"] < 1e-5
        assert report[f"vae {name}"]["params"] < 1e-4
        # In microbatches not a bit differs, searches that jump at kinks of ReLU included.
        assert report[f"vlae {name}"]["losses"] == report[f"vlae {name}"]["params"] == 0
        elements = report["elements"]
        # The two 64 x 64 layers are split in eight, the rest is small and whole.
        elements -= 2 * 64 * 64 * 7 // 8 if name == "sharded" else 0
        assert report[f"vlae {name}"]["elements on a device"] == elements
    assert report["evaluation"]["log_prob"] < 1e-4
    assert report["evaluation"]["elbo"] < 1e-4
    assert report["evaluation"]["kl"] < 1e-4
    assert report["evaluation"]["ess"] < 1e-2


def same_steps():
    """Loss after each step of one device's run, and what eight make of the same states."""
    jax.config.update("jax_disable_most_optimizations", True)
    dataset = load_dataset("digits")
    trained = initialize(small_config("vlae"), dataset)
    one, eight = (Trainer(trained, dataset, place) for place in (Placement.here(), Placement.of()))
    state, differences = one.init(), []
    pairs = zip(one.feed.arguments(0), eight.feed.arguments(0), strict=True)
    for _, (here, everywhere) in zip(range(15), pairs, strict=False):
        copied = eight.placement.put(jax.device_get(state))
        _, found = eight.step(copied, *everywhere)
        state, expected = one.step(state, *here)
        differences.append(abs(float(found) / float(expected) - 1))
    print(json.dumps([float(np.median(differences)), max(differences)]))


@pytest.mark.slow
def test_each_step_of_a_mode_search_is_the_same_on_eight_devices():
    """Step by step, for a run diverges: a posterior jumps where its mode crosses a kink of ReLU.

    One image in 128 whose posterior changes by a tenth of a nat moves the mean by 1e-5.
    """
    median, largest = in_eight_devices("same_steps")
    assert median < 1e-6
    assert largest < 1e-4


def spread_work():
    """Share of the samples' work on each device, by XLA's own count."""
    from vlae_jax import DiagonalPosterior, importance_weighted_log_prob

    placement = Placement.of().for_batch(1)
    weights = jax.random.normal(jax.random.key(0), (8, 256))

    def estimate(place):
        def one(key):
            posterior = DiagonalPosterior(jax.numpy.zeros(8), jax.numpy.zeros(8))
            return importance_weighted_log_prob(
                key,
                lambda z: -((z @ weights) ** 2).sum(),
                posterior,
                num_samples=1600,
                chunk_size=800,
                place=place,
            )[0]

        compiled = (
            jax.jit(one, out_shardings=placement.replicated).lower(jax.random.key(1)).compile()
        )
        return compiled.cost_analysis()["flops"], float(compiled(jax.random.key(1)))

    (whole, value), (share, same) = estimate(None), estimate(placement.split_samples)
    print(json.dumps([share / whole, value, same]))


@pytest.mark.slow
def test_importance_samples_are_spread_over_devices():
    share, value, same = in_eight_devices("spread_work")
    assert share < 1.5 / 8
    np.testing.assert_allclose(same, value, rtol=1e-5)


# Placement


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((512, 784), (None, ("data", "samples"))),
        ((4096,), (("data", "samples"),)),
        ((512, 7), ()),
        ((4095, 4095), ()),
        ((3, 512, 512), (None, ("data", "samples"))),
        ((), ()),
    ],
    ids=str,
)
def test_a_parameter_is_split_along_its_longest_axis_that_can_be(monkeypatch, shape, expected):
    placement = Placement.of(shard_parameters=True)
    monkeypatch.setattr(Placement, "size", 8)
    tree = [jax.ShapeDtypeStruct(each, np.float32) for each in (shape, (512, 512))]
    assert placement.of_parameters(tree)[0].spec == PartitionSpec(*expected)


def test_parameters_that_cannot_be_split_at_all_are_refused(monkeypatch):
    placement = Placement.of(shard_parameters=True)
    monkeypatch.setattr(Placement, "size", 8)
    with pytest.raises(UserError, match=r"no parameter has an axis that 8 devices could share"):
        placement.of_parameters([jax.ShapeDtypeStruct((500, 500), np.float32)])


def test_devices_that_cannot_share_a_batch_evenly_are_refused(monkeypatch):
    placement = Placement.of()
    monkeypatch.setattr(Placement, "size", 3)
    with pytest.raises(UserError, match=r"128 cannot be split evenly over 3 devices; .*multiple"):
        fit(small_config("vae"), placement=placement)
    with pytest.raises(UserError, match=r"microbatches 16 cannot be split evenly over 3 devices"):
        fit(small_config("vae", 16), placement=placement)


def test_random_keys_are_placed_as_keys():
    keys = jax.random.split(jax.random.key(3), 4)
    placed = Placement.of().put(keys)
    assert placed.dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.key_data(placed), jax.random.key_data(keys))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes must be at least 1"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"timeout": 0}, "timeout must be at least 1"),
        ({"timeout": 2**31}, "timeout must be at least 1 and at most 2147483647"),
        ({"processes": 2, "process_id": 2}, "process-id must be from 0"),
        ({"process_id": -1}, "process-id must be from 0"),
        ({"coordinator": "host"}, "must be HOST:PORT"),
        ({"coordinator": "host:port"}, "must be HOST:PORT"),
        ({"coordinator": "host:99999"}, "must be HOST:PORT"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DistributedConfig(**options)


def test_what_is_missing_to_join_others_is_named():
    with pytest.raises(UserError, match=r"processes and --distributed.process-id must be given"):
        join(DistributedConfig(coordinator="localhost:1"))


def test_more_devices_than_there_are_are_refused(monkeypatch):
    monkeypatch.setenv("NPROC", "4")  # put back what `start` sets
    jax.devices()  # from here on there are no more
    with pytest.raises(UserError, match=r"devices is 99, but this process has only \d+ cpu"):
        join(DistributedConfig(devices=99))


@pytest.mark.parametrize(
    ("platforms", "words"),
    [("cuda,cpu", "names cuda first, but JAX finds only cpu"), ("tpu,cpu", "finds no device for")],
)
def test_a_platform_that_is_not_there_is_told_in_one_line(tmp_path, platforms, words):
    process = launch("--run-dir", str(tmp_path / "run"), JAX_PLATFORMS=platforms)
    [(code, _, error)] = outcome([process])
    assert code == 2 and words in error
    assert not (tmp_path / "run").exists()


# Real processes on this machine, by the command line


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Processes load what another has compiled; this one has read its settings already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield


ARGUMENTS = [
    *("--method", "vae", "--hidden", "16", "--latent", "3", "--epochs", "9"),
    *("--batch-size", "128", "--microbatches", "4", "--learning-rate", "0.01"),
    *("--importance-samples", "8", "--proposal", "posterior", "--test-images", "16"),
    *("--log-every", "1"),
]
STEPS = 90
CONFIG = Config(
    model=ModelConfig(latent=3, hidden=(16,)),
    inference=InferenceConfig(method="vae"),
    training=TrainingConfig(epochs=9, microbatches=4, learning_rate=1e-2),
    evaluation=EvaluationConfig(8, "posterior", test_images=16),
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, count, *more, ids=None, port=None):
    """`vlae_jax train` in so many processes that know of each other."""
    port = port or free_port()
    return [
        launch(
            *("--run-dir", str(folder), "--distributed.coordinator", f"127.0.0.1:{port}"),
            *("--distributed.processes", str(count), "--distributed.process-id", str(process_id)),
            *more,
        )
        for process_id in (range(count) if ids is None else ids)
    ]


def launch(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "vlae_jax", "train", *ARGUMENTS, *arguments],
        env={
            **os.environ,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_by_slurm(folder, count):
    """The same without a word about processes, in the environment that srun makes."""
    job = {
        "SLURM_JOB_ID": str(np.random.default_rng(time.time_ns()).integers(4096)),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
    }
    return [
        launch("--run-dir", str(folder), **job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
        for i in range(count)
    ]


def outcome(processes, timeout=150):
    """(exit code, standard output, last line of standard error) of each."""
    found = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            raise
        assert "Traceback" not in err, err
        found.append((process.returncode, out, (err.strip().splitlines() or [""])[-1]))
    return found


def records(folder, split):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == split]


def wait_for_lines(folder, count, processes, checkpoints=1):
    """Return once so many lines are logged and so many checkpoints are whole."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        complete = sum(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))
        if (
            complete >= checkpoints
            and metrics.exists()
            and metrics.read_bytes().count(b"\n") >= count
        ):
            return
        time.sleep(0.005)
    for process in processes:
        process.kill()
    raise AssertionError([process.communicate() for process in processes])


def last_params(folder):
    """Of a run by any number of processes, restored in this one, on its one device."""
    arrays = arrays_of(initialize(CONFIG, load_dataset("digits")))
    checkpoints = Checkpoints(RunFolder(folder).checkpoints, read_only=True)
    restored = checkpoints.restore_last(lambda info: {"model": arrays})
    return restored.step, jax.device_get(restored.trees["model"]["params"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, outcome(start_by_slurm(folder, 2))


@pytest.mark.slow
def test_two_processes_give_the_run_of_one_and_the_first_alone_writes(unbroken, tmp_path):
    folder, ends = unbroken
    assert [code for code, *_ in ends] == [0, 0], ends
    # What is left of the second one's output is a line of the network library.
    assert "test log p(x)" in ends[0][1] and not re.sub(r"\[Gloo\].*\n", "", ends[1][1])
    assert not list(folder.rglob("*tmp*")) and (folder / "report.html").exists()
    assert "2 x cpu" in (folder / "results.json").read_text()

    alone = tmp_path / "alone"
    [(code, *_)] = outcome(start(alone, 1))
    assert code == 0
    for split in ("train", "validation"):
        one, two = records(alone, split), records(folder, split)
        assert [r["step"] for r in one] == [r["step"] for r in two]
        elbos = [[r["elbo"] for r in run] for run in (one, two)]
        np.testing.assert_allclose(*elbos, rtol=0 if split == "train" else 1e-5)
    jax.tree.map(np.testing.assert_array_equal, last_params(alone)[1], last_params(folder)[1])
    metrics = [
        {m["name"]: m["value"] for m in json.loads((run / "results.json").read_text())["metrics"]}
        for run in (alone, folder)
    ]
    assert metrics[0].keys() == metrics[1].keys()
    for name in ("log_prob", "elbo", "kl", "bits_per_dim"):
        np.testing.assert_allclose(metrics[1][name], metrics[0][name], rtol=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_processes_end_where_unbroken_ones_do(unbroken, tmp_path):
    """SIGKILL to one of two: the other says so and leaves; both resumed are equal bit for bit.

    Though the last checkpoint was damaged, which both must notice.
    """
    folder, rng = tmp_path / "run", np.random.default_rng(time.time_ns())
    processes = start(folder, 2, "--checkpoint-every", "7")
    wait_for_lines(folder, int(rng.integers(25, 45)), processes, checkpoints=2)
    processes[1].kill()
    (code, _, line), (killed, *_) = outcome(processes, timeout=90)
    assert killed == -signal.SIGKILL
    assert code == LOST_PEER and "has lost another one" in line and "--resume" in line
    newest = max(Checkpoints(RunFolder(folder).checkpoints, read_only=True).steps())
    flip_a_bit(folder / "checkpoints" / str(newest), rng)
    resumed = start(folder, 2, "--resume", "--checkpoint-every", "7")
    ends = outcome(resumed)
    assert [code for code, *_ in ends] == [0, 0], ends
    (step, found), (_, expected) = last_params(folder), last_params(unbroken[0])
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    steps = [record["step"] for record in records(folder, "train")]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_to_one_saves_the_same_step_in_all_and_four_go_on(unbroken, tmp_path):
    folder = tmp_path / "run"
    whole = ("--microbatches", "None")  # which rounds otherwise, and with the number of processes
    processes = start(folder, 2, *whole)
    wait_for_lines(folder, 12, processes)
    processes[1].send_signal(signal.SIGTERM)
    ends = outcome(processes)
    assert [code for code, *_ in ends] == [128 + signal.SIGTERM] * 2, ends
    stops = [re.search(r"stopped by SIGTERM at step (\d+), all saved", line) for *_, line in ends]
    assert stops[0] and stops[1] and stops[0][1] == stops[1][1]
    assert last_params(folder)[0] == int(stops[0][1]) < STEPS
    ends = outcome(start(folder, 4, *whole, "--resume-if-there"))
    assert [code for code, *_ in ends] == [0] * 4, ends
    for split in ("train", "validation"):
        found, expected = ([r["elbo"] for r in records(f, split)] for f in (folder, unbroken[0]))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_a_peer_that_does_not_come_is_told_in_the_stated_time(tmp_path):
    began = time.monotonic()
    waiting = [
        start(tmp_path / "run", 2, "--distributed.timeout", "3", ids=[process_id])
        for process_id in (0, 1)
    ]
    for process_id, processes in enumerate(waiting):
        [(code, _, line)] = outcome(processes, timeout=60)
        assert code == 2
        assert f"process {process_id} of 2" in line and "within 3 s" in line
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_taken_port_and_counts_and_options_that_differ_are_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [(code, _, line)] = outcome(start(tmp_path / "run", 2, ids=[0], port=port))
    assert code == 2 and f"port {port}" in line and "choose another" in line

    port = free_port()
    soon = ("--distributed.timeout", "15")
    two = start(tmp_path / "run", 2, *soon, ids=[0], port=port)
    three = start(tmp_path / "run", 3, *soon, ids=[1, 2], port=port)
    for code, _, line in outcome([*two, *three], timeout=90):
        assert code == 2 and re.search("number|lost another", line), line

    port = free_port()
    first = start(tmp_path / "run", 2, ids=[0], port=port)
    other = start(tmp_path / "run", 2, "--seed", "5", ids=[1], port=port)
    for code, _, line in outcome([*first, *other]):
        assert code == 2 and "configuration of process 1 is not that of process 0" in line
    assert not (tmp_path / "run").exists()
