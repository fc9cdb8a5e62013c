"""How the kernel on rows multiplies the columns of a tile: in panels, strips and pieces of the contraction."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from support.tpu_rows_problems import TILES, assert_close, draw, multiply

from moe_jax.kernels.activations import Activation
from moe_jax.kernels.device import TPU_DEVICES
from moe_jax.kernels.mosaic_tpu import limits, panels, rows_kernel
from moe_jax.kernels.mosaic_tpu.schedule import VisitTable


@pytest.mark.parametrize(
    ("contract", "columns", "panel"),
    [("in", 1280, 512), ("out", 1280, 512), ("in", 1408, 512), ("out", 1024, 512), ("in", 1536, 512)],
)
def test_tiles_of_many_columns_are_multiplied_panel_by_panel(contract, columns, panel, rng, monkeypatch):
    """Panels of two strips of 256 columns, and what is left: one strip, a strip and a half, nothing."""
    options = dict(projections=2, activation=Activation("silu"), bias=True) if contract == "in" else {}
    problem = draw(rng, (130, 0, 17), width_in=16, width_out=columns - 30, contract=contract, row_scale=True, **options)
    projections = options.get("projections", 1)
    monkeypatch.setattr(limits, "MOST_PANEL_ELEMENTS", projections * 16 * 512)
    assert limits.panel_columns(columns, projections, 16, lone_strips=False) == panel
    tiles = dataclasses.replace(TILES, columns=columns)
    result, _ = multiply(problem, tiles=tiles)
    assert_close(result, problem.result)


@pytest.mark.parametrize(
    ("columns", "projections", "depth", "panel"),
    [(1536, 2, 2048, 768), (2048, 1, 2048, 2048), (4096, 1, 7168, 512), (5760, 1, 4096, 1024), (384, 2, 28672, 256)],
)
def test_panels_are_equal_where_a_few_more_of_them_make_them_so(columns, projections, depth, panel):
    assert limits.panel_columns(columns, projections, depth, lone_strips=False) == panel


@pytest.mark.parametrize("device", TPU_DEVICES)
@pytest.mark.parametrize("contract", ["in", "out"])
def test_long_rows_are_multiplied_in_pieces_and_by_several_strips(contract, device, rng):
    """Pieces of 512 and 256 columns with one that is narrower on v5e and v5p, a strip of 512 columns on 7x, else of 256."""
    options = dict(projections=2, activation=Activation("silu"), bias=True) if contract == "in" else {}
    sizes_of = dict(width_in=600, width_out=500, contract=contract, row_scale=True, dtype=jnp.bfloat16)
    problem = draw(rng, (130, 0, 17), **sizes_of, **options)
    tiles = dataclasses.replace(TILES, columns=512)
    assert_close(multiply(problem, tiles=tiles, device=device)[0], problem.result)


@pytest.mark.parametrize("gated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deep_matrices_are_multiplied_strip_by_strip_with_all_projections_at_once(gated, rng, monkeypatch):
    """On 7x: pieces of 768 columns of the contraction, the last one narrower; strips of 128 or 256 columns, the last one too."""
    options = dict(projections=2, activation=Activation("silu")) if gated else {}
    sizes_of = dict(width_in=2100, width_out=500, row_scale=True, dtype=jnp.bfloat16)
    problem = draw(rng, (130, 0, 17), bias=True, **sizes_of, **options)
    products = []
    dot_general = jax.lax.dot_general

    def counted(rows, matrix, *arguments, **named):
        products.append((rows.shape[1], matrix.shape[0]))
        return dot_general(rows, matrix, *arguments, **named)

    monkeypatch.setattr(panels.lax, "dot_general", counted)
    tiles = dataclasses.replace(TILES, columns=384)
    result, projected = multiply(problem, tiles=tiles, device="7x", keep_projected=gated)
    assert_close(result, problem.result)
    assert set(products) == {(depth, columns) for depth in (768, 564) for columns in ((256,) if gated else (256, 128))}
    if gated:
        assert_close(projected, problem.projected)


@pytest.mark.parametrize(
    ("device", "depth", "itemsize", "lone"),
    [
        ("7x", 2880, 2, True),
        ("7x", 2048, 2, False),  # the ends of panels would cost more than turns
        ("7x", 7168, 4, False),
        ("v6e", 7168, 2, False),
        ("v5p", 7168, 2, False),
    ],
)
def test_only_deep_matrices_of_two_bytes_have_lone_strips_and_only_on_7x(device, depth, itemsize, lone):
    assert limits.has_lone_strips(depth, itemsize, TPU_DEVICES[device]) == lone


def test_lone_strips_have_as_many_columns_of_all_projections_as_a_matrix_unit():
    assert limits.panel_columns(1024, 1, 7168, lone_strips=True) == 256
    assert limits.panel_columns(1024, 2, 7168, lone_strips=True) == 128
    assert limits.panel_columns(128, 1, 7168, lone_strips=True) == 128


@pytest.mark.parametrize(
    ("device", "size", "depth_at_once"),
    [
        ("v5e", 16, 2048),
        ("v5e", 64, 512),
        ("v5p", 64, 512),
        ("v5p", 96, 256),
        ("v5p", 128, 256),
        ("v5p", 192, 256),
        ("v6e", 64, 7168),
        ("7x", 512, 7168),
    ],
)
def test_pieces_fill_the_matrix_units_where_a_strip_is_wider_than_one(device, size, depth_at_once):
    assert limits.contracted_at_once(size, 7168, 2, TPU_DEVICES[device]) == depth_at_once
    assert limits.contracted_at_once(size, 7168, 4, TPU_DEVICES[device]) == 7168


@pytest.mark.parametrize(
    ("device", "panel", "projections", "strip"),
    [
        ("7x", 512, 1, 512),
        ("7x", 384, 1, 384),
        ("7x", 512, 2, 256),
        ("7x", 256, 2, 256),
        ("7x", 1024, 1, 256),
        ("v6e", 512, 1, 256),
        ("v5p", 512, 1, 256),
        ("v5e", 128, 1, 128),
    ],
)
def test_a_panel_of_two_strips_is_one_where_matrix_units_multiply_by_a_strip_each(device, panel, projections, strip):
    assert limits.strip_columns(panel, projections, TPU_DEVICES[device]) == strip


def equations_within(value):
    """All equations of a program, those of loops and branches too."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from equations_within(each)
    elif isinstance(value, (Jaxpr, ClosedJaxpr)):
        for equation in value.eqns:
            yield equation
            yield from equations_within(list(equation.params.values()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("device", TPU_DEVICES)
def test_each_product_of_a_panel_reads_its_rows_anew_where_a_tile_is_half_a_register(device, dtype, rng):
    """Each of four products reads another scalar, for 64, 128 and 192 rows: the compiler cannot know that rows are the same."""
    options = dict(projections=2, activation=Activation("silu"))
    problem = draw(rng, (130, 0, 17), width_in=24, width_out=500, dtype=dtype, **options)
    tiles = dataclasses.replace(TILES, columns=512)
    anew = device != "7x" and dtype == jnp.bfloat16

    def result(rows):
        table = VisitTable.of(problem.groups, rows.shape[0], tiles.rows)
        operands = problem.operands | {"rows": rows}
        return rows_kernel.multiply_rows(
            **operands, table=table, tiles=tiles, output_dtype=jnp.float32, device=TPU_DEVICES[device]
        )[0]

    equations = list(equations_within(jax.make_jaxpr(result)(problem.operands["rows"])))
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    read = [equation.invars for equation in equations if equation.primitive.name == "get"]
    scalars = [str(index) for reference, *index in read if reference.aval.shape == (4,)]
    assert len(products) == 3 * 4
    assert len(scalars) == (3 * 4 if anew else 0)
    assert len(set(scalars)) == (4 if anew else 0)
