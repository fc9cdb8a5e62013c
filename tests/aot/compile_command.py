"""`moe-jax compile` for real targets: a tiny model on TPUs and GPUs that this machine lacks, with every dispatch strategy, and a
model that fits on neither.

    python tests/aot/compile_command.py          # part of `make aot`; needs the extra `aot`

A line per compile; the exit status is 1 if one of them isn't as it must be.
"""

import contextlib
import functools
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moe_jax.cli import exit_codes, main

TINY: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
HUGE = TINY | {"hidden_size": 8192, "moe_intermediate_size": 16384, "num_experts": 64, "num_hidden_layers": 40}
"""2 TB of weights."""
LAYERS = TINY["num_hidden_layers"]

MOVING = {
    "allgather_reducescatter": (("all-gather",), ("reduce-scatter", "all-reduce")),  # few rows are summed in whole
    "padded_all_to_all": (("all-to-all",),),
    "ragged_all_to_all": (("ragged-all-to-all",),),
}
"""The strategies that move tokens, and the collectives that every layer has, of each one of the kinds."""


TARGETS_OF_STRATEGY = {"allgather_reducescatter": ("v6e:2x2",), "padded_all_to_all": ("h200:1x8",)}
"""Each compile takes a while: only one of those whose collectives both compilers leave as they are, or nearly so."""


def compile_model(folder: Path, config: dict[str, Any], target: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and report of one compile."""
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    command = ["compile", str(file), "--target", target, "--json", "--batch", "8", "--prompt-length", "64", *arguments]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(command)
    if status not in (exit_codes.SUCCESS, exit_codes.CHECK_FAILED):
        raise RuntimeError(f"moe-jax {' '.join(command)} ended with {status}")
    return status, json.loads(output.getvalue())


def problems_of_tiny(status: int, report: dict[str, Any]) -> list[str]:
    """What is wrong with a report of `TINY`."""
    problems = [] if status == 0 and report["fits"] else ["it was said not to fit"]
    if [program["name"] for program in report["programs"]] != ["prefill", "decode"]:
        return [*problems, "prefill and decode were not both compiled"]
    for program in report["programs"]:
        sums = [row for row in program["collectives"] if row["kind"] in ("all-reduce", "reduce-scatter")]
        if not any(row["executions"] % LAYERS == 0 for row in sums):
            problems.append(f"{program['name']}: no sum of each layer's experts over the devices, got {sums}")
        if program["needed_bytes"] < report["parameter_bytes"]:
            problems.append(f"{program['name']}: needs less memory than its weights")
    decode = report["programs"][1]["collectives"]
    if not any(row["in_loop"] for row in decode):
        problems.append("decode: no collective for each token")
    return problems


def problems_of_strategy(strategy: str, status: int, report: dict[str, Any]) -> list[str]:
    """What is wrong with a report of `TINY` with a strategy that moves tokens."""
    problems = [] if status == 0 and report["fits"] else ["it was said not to fit"]
    if report["mesh"] != {"data": 1, "expert": report["devices"], "tensor": 1}:
        problems.append(f"experts are not split over all devices but as {report['mesh']}")
    for program in report["programs"]:
        of_layers = {row["kind"] for row in program["collectives"] if row["executions"] % LAYERS == 0}
        for kinds in MOVING[strategy]:
            if not of_layers & set(kinds):
                found = [(row["kind"], row["operands"], row["executions"]) for row in program["collectives"]]
                problems.append(f"{program['name']}: no {' or '.join(kinds)} of each layer, got {found}")
    return problems


def problems_of_huge(status: int, report: dict[str, Any]) -> list[str]:
    """What is wrong with a report of `HUGE`."""
    problems = [] if status == 1 and not report["fits"] else ["it was said to fit"]
    prefill = report["programs"][0]
    if prefill["needed_bytes"] < report["parameter_bytes"]:
        problems.append("it needs less memory than its weights")
    if not any("prefill does not fit" in warning for warning in report["warnings"]):
        problems.append("there is no remark that prefill does not fit")
    return problems


def check_all() -> int:
    """Compile all; the exit status."""
    cases: list[tuple[str, dict[str, Any], list[str], Any]] = [
        ("a tiny model", TINY, [], problems_of_tiny),
        ("a model that doesn't fit", HUGE, [], problems_of_huge),
    ]
    for strategy in MOVING:
        check = functools.partial(problems_of_strategy, strategy)
        cases.append((strategy, TINY, ["--strategy", strategy], check))
    found_any = False
    with tempfile.TemporaryDirectory() as folder:
        for name, config, arguments, check in cases:
            for target in TARGETS_OF_STRATEGY.get(name, ("v6e:2x2", "h200:1x8")):
                started = time.perf_counter()
                status, report = compile_model(Path(folder), config, target, "--implementation", "xla", *arguments)
                problems = check(status, report)
                found_any |= bool(problems)
                print(
                    f"{name} on {target}: {'; '.join(problems) or 'as it must be'} ({time.perf_counter() - started:.0f} s)"
                )
    return int(found_any)


if __name__ == "__main__":
    sys.exit(check_all())
