"""Scaling on paper: what programs say of themselves, and what a chip's peaks make of it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import run_in_subprocess

from vlae_jax.expansions import MatrixFreeExpansion, Products
from vlae_jax.runs.config import Config, DataConfig, InferenceConfig, ModelConfig, TrainingConfig
from vlae_jax.runs.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Where the benchmarks are a package."""
    monkeypatch.syspath_prepend(str(ROOT))


def small_model(method, network="mlp"):
    """With the images that it is to be trained on."""
    from benchmarks.scaling_programs import low_rank_images, untrained

    config = Config(
        data=DataConfig(dataset="patterns"),
        model=ModelConfig(network=network, channels=(2, 3), hidden=(12, 10), latent=4),
        inference=InferenceConfig(method=method, steps=2, solver="cg"),
        training=TrainingConfig(batch_size=8),
    )
    return untrained(config, low_rank_images(20, (8, 8, 1)))


TRAINED = sorted(name for name, method in METHODS.items() if method.fit is None)


CONVOLUTIONS = pytest.param("vlae", "conv", marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "network"), [*((method, "mlp") for method in TRAINED), CONVOLUTIONS]
)
def test_every_training_step_lowers_for_tpus(method, network):
    """With no call of a library, as LAPACK on a CPU, and no 64-bit floats."""
    from benchmarks.scaling_programs import exported, foreign_calls

    program = exported(*small_model(method, network))
    text = program.mlir_module()
    assert program.platforms == ("tpu",)
    assert foreign_calls(text) == set()
    assert "f64" not in text
    assert ("stablehlo.cholesky" in text) == (method == "vlae")


def test_foreign_calls_are_seen():
    """The same factorization lowered for a CPU is one."""
    from benchmarks.scaling_programs import foreign_calls

    lowered = jax.jit(jnp.linalg.cholesky).lower(jnp.eye(3))
    assert any("potrf" in name for name in foreign_calls(lowered.as_text()))


# --------------------------------------------------------------------- compiled programs

PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p.0: f32[100,8], p.1: s32[]) -> f32[1,8] {
  %p.0 = f32[100,8]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %row = f32[1,8]{1,0:T(8,128)S(1)} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
}

%inner_condition (i.0: (pred[])) -> pred[] {
  %i.0 = (pred[]{:T(512)}) parameter(0)
  %go_on = pred[]{:T(512)S(6)} get-tuple-element(%i.0), index=0
  %word = u32[]{:T(128)S(6)} bitcast(%go_on)
  %any = u32[]{:T(128)S(6)} all-reduce(%word), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %bit = pred[]{:T(512)S(6)} bitcast(%any)
}

%inner_body (i.1: (pred[])) -> (pred[]) {
  %i.1 = (pred[]{:T(512)}) parameter(0)
  %a.1 = f32[8,16]{1,0:T(8,128)S(1)} constant({...})
  %b.1 = f32[16,32]{1,0:T(8,128)S(1)} constant({...})
  %c.1 = f32[8,32]{1,0:T(8,128)S(1)} convolution(%a.1, %b.1), dim_labels=bf_io->bf
  %flag = pred[]{:T(512)S(6)} constant(false)
  ROOT %t.1 = (pred[]{:T(512)}) tuple(%flag)
}

%outer_condition (o.0: (s32[])) -> pred[] {
  %o.0 = (s32[]{:T(128)}) parameter(0)
  %count = s32[]{:T(128)S(6)} get-tuple-element(%o.0), index=0
  %bound = s32[]{:T(128)S(6)} constant(3)
  ROOT %less = pred[]{:T(512)S(6)} compare(%count, %bound), direction=LT
}

%outer_body (o.1: (s32[])) -> (s32[]) {
  %o.1 = (s32[]{:T(128)}) parameter(0)
  %start = (pred[]{:T(512)}) tuple()
  %searched = (pred[]{:T(512)}) while(%start), condition=%inner_condition, body=%inner_body
  %batched = f32[5,6,7]{2,1,0:T(8,128)S(1)} constant({...})
  %other = f32[5,7,4]{2,1,0:T(8,128)S(1)} constant({...})
  %each = f32[5,6,4]{2,1,0:T(8,128)S(1)} convolution(%batched, %other), window={size=5 stride=4 \
lhs_dilate=5}, dim_labels=0bf_0io->0bf, operand_precision={highest,default}
  ROOT %t.2 = (s32[]{:T(128)}) get-tuple-element(%searched), index=0
}

ENTRY %main (table: f32[100,8], at: s32[]) -> f32[10,8] {
  %table = f32[100,8]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)S(6)} parameter(1)
  %row.1 = f32[1,8]{1,0:T(8,128)S(1)} fusion(%table, %at), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"70"}}
  %there = (f32[100,8]{1,0:T(8,128)S(1)}, f32[100,8]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%table)
  %here = f32[100,8]{1,0:T(8,128)S(1)} copy-done(%there)
  %first = (s32[]{:T(128)}) tuple()
  %steps = (s32[]{:T(128)}) while(%first), condition=%outer_condition, body=%outer_body
  %gradient = f32[10,8]{1,0:T(8,128)} custom-call(%here), custom_call_target="Cholesky"
  ROOT %total = f32[10,8]{1,0:T(8,128)} all-reduce(%gradient), replica_groups={{0,1},{2,3}}, \
to_apply=%add
}
"""
TILES = 4 * 8 * 128
"""Bytes of a tile of float32, in which TPUs store whatever is smaller."""


@pytest.fixture
def program():
    from benchmarks import hlo

    return hlo.parse(PROGRAM)


def test_products_count_as_often_as_loops_run_by_their_precision(program):
    """A search of 3 steps with 2 unknown products each, and a batch of 5 products a step."""
    from benchmarks.hlo import matmul_flops

    found = matmul_flops(program, unknown_trips=2)
    assert found == {
        "default": 3 * 2 * (2 * 8 * 16 * 32),
        "high": 0,
        "highest": 3 * (5 * 2 * 6 * 7 * 4),
    }


def test_memory_traffic_leaves_out_what_stays_on_the_chip(program):
    """Read: one row and, in tiles, the whole table; the gradient is written, read, written."""
    from benchmarks.hlo import main_memory_bytes

    whole = 13 * TILES  # 100 rows are 13 times 8
    gradient = 2 * TILES
    assert main_memory_bytes(program) == 4 * 8 + whole + gradient + 2 * gradient


def test_collectives_count_in_loops_and_by_group(program):
    """A condition is looked at once more than its loop runs."""
    from benchmarks.hlo import Collective, collectives, sent_bytes

    found = collectives(program, devices=4, unknown_trips=2)
    assert sorted(found) == [
        Collective("all-reduce", 4, 4, 3 * (2 + 1)),
        Collective("all-reduce", 4 * 10 * 8, 2, 1),
    ]
    assert [sent_bytes(each) for each in sorted(found)] == [2 * 4 * 3 / 4, 2 * 320 * 1 / 2]


def test_estimates_and_calls_are_read(program):
    from benchmarks.hlo import custom_calls, estimated_cycles

    assert estimated_cycles(program) == 70
    assert custom_calls(program) == {"Cholesky"}


def test_convolutions_count_as_xla_counts_them():
    """With stride, padding, holes in either operand, and groups of channels."""
    from benchmarks import hlo

    x, kernel = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 2, 2, 6))
    for options in (
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 1)), "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": ((0, 0), (1, 0)), "lhs_dilation": (2, 3)},
    ):

        def convolve(x, kernel, options=options):
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=2,
                precision="high",
                **options,
            )

        compiled = jax.jit(convolve).lower(x, kernel).compile()
        found = hlo.matmul_flops(hlo.parse(compiled.as_text()))
        assert found["high"] == compiled.cost_analysis()["flops"]


COUNT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from project.test_scaling import small_model
from benchmarks import hlo
from benchmarks.scaling_programs import OnPaper
from vlae_jax.training.step import Trainer
for method in sys.argv[1:] or ("vae", "vlae", "sa_vae"):
    trained, dataset = small_model(method)
    trainer = Trainer(trained, dataset, OnPaper.of(jax.devices()))
    state = trainer.init()
    compiled = trainer.step.lower(state, *next(trainer.feed.arguments(0))).compile()
    found = hlo.collectives(hlo.parse(compiled.as_text()), devices=8, unknown_trips=5)
    assert {(each.kind, each.devices) for each in found} == {("all-reduce", 8)}, found
    print(sum(leaf.nbytes for leaf in jax.tree.leaves(trained.params)), len(state.sums),
          sum(each.bytes * each.times for each in found), sum(map(hlo.sent_bytes, found)))
"""


@pytest.mark.slow
def test_devices_sum_the_gradient_and_the_metrics_once_and_nothing_else():
    """Nor does a loop ask the others: of conjugate gradients, or of unrolled steps backwards."""
    from benchmarks.roofline import ring_bytes

    printed = run_in_subprocess(
        COUNT,
        timeout=150,
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'src'}",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    lines = printed.strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        parameters, metrics, summed, sent = map(float, line.split())
        assert summed == parameters + 4 * (1 + metrics)
        np.testing.assert_allclose(sent, ring_bytes(summed, 8))


# ------------------------------------------------------------------------------- the peaks


def test_summing_takes_the_slower_of_bandwidth_and_latency():
    """TPU v5e: four links of 50 GB/s; an axis is a ring from 16 chips on."""
    from benchmarks.roofline import TPU_V5E, all_reduce_seconds

    def seconds(shape, size):
        return all_reduce_seconds(TPU_V5E, shape, size)

    assert seconds((1, 1), 1e9) == 0
    # One direction along each of two axes; 7 of 8 chips' shares, twice.
    np.testing.assert_allclose(seconds((2, 4), 1e8), 2 * 7 / 8 * 1e8 / 100e9)
    np.testing.assert_allclose(seconds((16, 16), 1e9), 2 * 255 / 256 * 1e9 / 200e9)
    # 1 µs a hop: 7 + 7 to the other corner of a grid, 8 + 8 on closed rings, there and back.
    np.testing.assert_allclose(seconds((8, 8), 4), 28e-6)
    np.testing.assert_allclose(seconds((16, 16), 4), 32e-6)
    np.testing.assert_allclose(seconds((1, 4), 4), 6e-6)


def test_a_step_takes_its_slowest_part_and_then_communicates():
    from benchmarks.roofline import Seconds

    step = Seconds(compute=3.0, memory=2.0, communication=0.5)
    assert (step.total, step.bound_by) == (3.5, "compute")
    assert step._replace(memory=4.0).total == 4.5


@pytest.mark.parametrize(
    ("points", "batch"),
    [
        ([(1, 5.0, 1.0), (2, 9.0, 1.0)], 1),
        ([(10, 1.0, 2.0), (20, 4.0, 3.0)], 15),  # 10 + 10 · 1/2
        ([(10, 1.0, 9.0), (20, 2.0, 9.0)], 90),  # 8 more of them at 1 each, in tens
        ([(10, 1.0, 2.0), (20, 2.0, 4.0)], None),
    ],
)
def test_lines_cross(points, batch):
    from benchmarks.roofline import crossing

    assert crossing(points) == batch


@pytest.mark.parametrize(("curvatures", "products"), [((1.0, 1.0), 1), ((1.0, 100.0), 2)])
def test_products_of_conjugate_gradients_are_counted(curvatures, products):
    """As many as there are different eigenvalues, where the first leaves out too much."""
    from benchmarks.scaling import count_products

    def at(z):
        return Products(0.0 * z[0], jnp.ones(2) + 0 * z, lambda v: jnp.asarray(curvatures) * v)

    def infer(key, image):
        return SimpleNamespace(
            at=SimpleNamespace(expansions=lambda: (MatrixFreeExpansion(lambda z: None, at), None)),
            inference=SimpleNamespace(iterates=jnp.zeros((4, 2)) + image[0]),
        )

    trained = SimpleNamespace(infer=infer)
    assert count_products(trained, np.zeros((5, 2), np.float32)) == [products] * 3


def test_the_page_has_the_tables_of_what_was_found(monkeypatch, tmp_path):
    from benchmarks import scaling_report

    page = tmp_path / "scaling.md"
    shutil.copy(scaling_report.PAGE, page)
    monkeypatch.setattr(scaling_report, "PAGE", page)
    scaling_report.run(None)
    assert page.read_text() == (ROOT / "docs" / "scaling.md").read_text()
