"""That rows move while others are multiplied, from the structure of the kernel: what starts and what is waited for, and where."""

import dataclasses

import pytest
from jax.extend import core
from support.expert_parallel_problems import Problem, Setting, traced

from moe_jax.kernels.expert_parallel import kernel


@dataclasses.dataclass(frozen=True)
class Event:
    """A copy, a wait for one, or a multiplication."""

    kind: str
    memory: frozenset[str]
    """Which of the kernel's arrays and semaphores it names."""
    loops: tuple[int, ...]
    """The loops that it is in, outermost first."""


def inner_jaxprs(equation):
    for parameter in equation.params.values():
        for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)


def events(jaxpr, names, loops=()):
    """In the order of the program; `names` are those of the jaxpr's arguments."""
    for equation in jaxpr.eqns:
        arguments = [names.get(value) if isinstance(value, core.Var) else None for value in equation.invars]
        kind = equation.primitive.name
        if kind in ("dma_start", "dma_wait", "dot_general"):
            yield Event(kind, frozenset(filter(None, arguments)), loops)
        inside = (*loops, id(equation)) if kind in ("while", "scan") else loops
        for inner in inner_jaxprs(equation):
            # Branches and bodies of loops take the last arguments of their equation, conditions of loops hold no event.
            last = arguments[len(arguments) - len(inner.invars) :]
            yield from events(inner, dict(zip(inner.invars, last, strict=False)), inside)


@pytest.fixture
def program(rng):
    setting = Setting(4)
    (call,) = [
        equation
        for equation in equations(traced(setting, Problem.draw(rng, setting)).jaxpr)
        if equation.primitive.name == "pallas_call"
    ]
    jaxpr = call.params["jaxpr"]
    names = {ref: name for name, ref in vars(kernel._Memory(jaxpr.invars)).items()}
    return list(events(jaxpr, names))


def places(program, kind, *memory):
    return [place for place, event in enumerate(program) if event.kind == kind and {*memory} <= event.memory]


def test_all_rows_are_being_sent_before_the_first_multiplication_and_nothing_waits_for_that_until_the_last(program):
    products = places(program, "dot_general")
    sends = places(program, "dma_start", "sent", "received", "sent_to", "arrived_for")
    assert len(sends) == 3  # to each other rank, in a loop over experts
    assert max(sends) < min(products)
    waits = places(program, "dma_wait", "sent_to")
    assert len(waits) == 3
    assert min(waits) > max(products)


def test_between_multiplications_only_what_the_next_one_needs_is_waited_for(program):
    products = places(program, "dot_general")
    (visits,) = {program[place].loops[0] for place in products}
    waited = {
        name
        for event in program
        if event.kind == "dma_wait" and visits in event.loops
        for name in event.memory
        & {"sent_to", "arrived_for", "weights_read", "tile_read", "tile_returned", "returned_by"}
    }
    assert waited == {"arrived_for", "weights_read", "tile_read", "tile_returned"}


def test_results_leave_inside_the_loop_over_tiles_and_are_not_waited_for_until_the_next_tile_is_nearly_done(program):
    products = places(program, "dot_general")
    tile_loop, block_loop = program[products[0]].loops[:2]
    returns = places(program, "dma_start", "results", "tile_returned")
    assert len(returns) == 4
    assert {program[place].loops for place in returns} == {(tile_loop,)}
    in_loop = [place for place in places(program, "dma_wait", "tile_returned") if program[place].loops]
    assert {program[place].loops for place in in_loop} == {(tile_loop, block_loop)}
    assert all(program[place].loops == () for place in places(program, "dma_wait", "returned_by"))


def test_weights_of_the_next_step_are_being_read_while_this_one_is_multiplied(program):
    products = places(program, "dot_general")
    (*_, start), wait = (
        sorted({*places(program, "dma_start", "gate_up_proj")}),
        max(places(program, "dma_wait", "gate_up_block")),
    )
    assert program[start].loops == program[wait].loops == program[products[0]].loops[:2]
    assert start < wait < min(products)
