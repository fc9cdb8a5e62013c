"""What each process of a job does in `test_processes.py`: a layer and a model over the devices of all, as JSON on stdout.

python layer_and_model.py COORDINATOR COUNT NUMBER CHECKPOINT CONVERTED SAVED
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from support import golden_cases
from support.balanced_layers import plain_and_balanced
from support.golden_models import QUICK_TO_COMPILE, relative_error
from support.sharded_layers import SHARED, layer_pair, small_config

from moe_jax import from_pretrained, save_pretrained
from moe_jax.checkpoints import CheckpointError, InMemoryCheckpoint, conversion
from moe_jax.config import ParallelConfig
from moe_jax.generation import GenerationSettings, generate
from moe_jax.load_balancing import EplbConfig, ExpertLoadBalancer
from moe_jax.models.elastic import move_model
from moe_jax.parallel import create_mesh, initialize_distributed

CASE = golden_cases.golden_case("qwen3_moe", "raw_probabilities")  # 12 experts
STRATEGIES = ("replicated", "allgather_reducescatter", "padded_all_to_all", "ragged_all_to_all")


def gathered(array):
    """All of a global array, on every process."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def layer_error(mesh, strategy):
    """Largest difference of a layer's output over all processes from that on one device, both with random weights."""
    rng = np.random.default_rng(7)  # the same numbers in every process
    in_rounds = dict(buffer_factor=0.4) if strategy == "ragged_all_to_all" else {}
    parallel = ParallelConfig(expert_axis="expert", tensor_axis="tensor", strategy=strategy, **in_rounds)
    single, sharded = layer_pair(rng, small_config(shared_experts=SHARED), mesh, parallel)
    x = np.asarray(rng.normal(size=(6, 6)), np.float32)
    expected = np.asarray(jax.jit(lambda layer, x: layer(x))(single, x))
    everywhere = NamedSharding(mesh, PartitionSpec())
    result = jax.jit(lambda layer, x: layer(x), out_shardings=everywhere)(sharded, x)
    return float(np.abs(np.asarray(result) - expected).max())


def balancing(mesh):
    """A layer with copies of experts, run, rearranged for its load and run again: what changed, on this process."""
    rng = np.random.default_rng(8)
    parallel = ParallelConfig(expert_axis="expert", tensor_axis="tensor")
    single, sharded = plain_and_balanced(rng, mesh, parallel, redundant=4)
    balancer = ExpertLoadBalancer(sharded, EplbConfig(window_size=2))
    x = np.asarray(rng.normal(size=(16, 6)), np.float32)
    ids = np.array([[4, 5]] * 12 + [[0, 7]] * 4, np.int32)  # of the hot experts only the first rank has copies
    everywhere = NamedSharding(mesh, PartitionSpec())

    @jax.jit
    def step(layer, load, x):
        y, aux = layer(x, forced_ids=ids, with_aux=True)
        return jax.lax.with_sharding_constraint(y, everywhere), balancer.record(load, aux.physical_load)

    before, load = step(sharded, balancer.init(), x)
    load, report = balancer.rearrange(sharded, load)
    after, load = step(sharded, load, x)
    expected = np.asarray(jax.jit(lambda layer, x: layer(x, forced_ids=ids))(single, x))
    return {
        "errors": [float(np.abs(np.asarray(y) - expected).max()) for y in (before, after)],
        "sent": report.sent,
        "load": report.logical_load[0].tolist(),
        "placement": balancer.physical_to_logical(sharded).tolist(),
        "recorded": int(load.num_recorded),
    }


def bytes_read():
    """Bytes that this process has read from converted folders so far."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def bytes_held(model):
    """Bytes of the parameters on this process's devices, those on several counted once."""
    total = 0
    for array in jax.tree.leaves(nnx.state(model)):
        shards = {str(shard.index): shard.data.nbytes for shard in array.addressable_shards}
        total += sum(shards.values())
    return total


def failed_saves(model, folder):
    """What this process is told when something is there, while parts are written, and when no parameter can be read."""
    taken, full, unread = (folder.with_name(name) for name in ("taken", "full", "unread"))
    taken.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError) as of_taken:
        save_pretrained(model, taken)
    with pytest.MonkeyPatch.context() as patch:
        fail_at_part(2, patch)
        with pytest.raises(CheckpointError) as of_full:
            save_pretrained(model, full)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InMemoryCheckpoint, "_read_slice", cannot_be_read)
        with pytest.raises(CheckpointError) as of_unread:
            save_pretrained(model, unread)
    return [str(caught.value) for caught in (of_taken, of_full, of_unread)]


def cannot_be_read(reader, path, *rest):
    raise CheckpointError(f"{path}: cannot be read")


def fail_at_part(number, patch):
    """Of the parts that are written from now on, this one isn't, and parts after it haven't been read by then."""
    write_part, written = conversion._write_part, []

    def write(writers, work, name, *rest):
        written.append(name)
        if len(written) == number:
            raise CheckpointError(f"{work.name}: no space left for part {number}")
        write_part(writers, work, name, *rest)

    patch.setattr(conversion, "_write_part", write)
    patch.setattr(conversion, "_PARTS_IN_FLIGHT", 1)


def stage(name):
    """Says on standard error how far this process is, for whoever looks for one that hangs."""
    print(f"{time.monotonic():.1f} {name}", file=sys.stderr, flush=True)


def main():
    coordinator, count, number, checkpoint, converted, saved = sys.argv[1:]
    initialize_distributed(coordinator, int(count), int(number))
    mesh = create_mesh({"expert": 2, "tensor": jax.device_count() // 2})
    report = {"processes": jax.process_count(), "devices": jax.device_count()}
    stage("layer")
    report["layer_errors"] = {strategy: layer_error(mesh, strategy) for strategy in STRATEGIES}

    stage("balance")
    report["balancing"] = balancing(mesh)

    stage("load")
    before = bytes_read()
    model = from_pretrained(converted, dtype=np.float32, mesh=mesh)
    report |= {"bytes_read": bytes_read() - before, "bytes_held": bytes_held(model)}
    stage("logits")
    expected = CASE.expected()
    graph, state = nnx.split(model)
    everywhere = NamedSharding(mesh, PartitionSpec())
    forward = jax.jit(
        lambda state, ids: nnx.merge(graph, state)(ids), out_shardings=everywhere, compiler_options=QUICK_TO_COMPILE
    )
    report["logits_error"] = relative_error(forward(state, np.asarray(expected.input_ids)), expected.logits)
    stage("safetensors")
    from_safetensors = nnx.state(from_pretrained(checkpoint, dtype=np.float32, mesh=mesh))
    same = jax.tree.map(lambda a, b: jnp.array_equal(a, b), state, from_safetensors)
    report["same_from_safetensors"] = all(bool(leaf) for leaf in jax.tree.leaves(same))

    stage("move")
    split_anew = create_mesh({"expert": jax.device_count()})
    moved = from_pretrained(converted, dtype=np.float32, mesh=mesh)
    move_model(moved, split_anew)
    loaded = nnx.state(from_pretrained(converted, dtype=np.float32, mesh=split_anew))
    report["same_if_moved"] = all(
        one.sharding.is_equivalent_to(other.sharding, one.ndim) and bool(jnp.array_equal(one, other))
        for one, other in zip(jax.tree.leaves(nnx.state(moved)), jax.tree.leaves(loaded), strict=True)
    )

    stage("generate")
    prompts = expected.prompts()[:2]
    cold, warm = (GenerationSettings(max_new_tokens=6, do_sample=True, temperature=t) for t in (1e-4, 1.0))
    report["coldest"] = generate(model, prompts, cold).tokens.tolist()  # as good as greedy, in the programs of `warm`
    report["drawn"] = generate(model, prompts, warm, seed=3).tokens.tolist()
    stage("fail to save")
    report["failed_saves"] = failed_saves(model, Path(saved))
    stage("save")
    save_pretrained(model, saved)
    stage("done")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
