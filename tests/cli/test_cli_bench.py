"""`moe-jax bench`."""

import dataclasses
import json
import re

import numpy as np
import pytest
from support.fading_memory_model import FadingMemoryModel

from moe_jax.cli import main


def test_bench_generate_shows_every_round_and_the_median(capsys, monkeypatch):
    model = FadingMemoryModel(np.eye(11, dtype=np.float32))
    monkeypatch.setattr("moe_jax.pretrained.from_pretrained", lambda source, dtype: model)
    options = ["--batch", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "3"]
    assert main(["bench", "generate", "model", *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["platform"] == "cpu"
    assert (document["batch_size"], document["prompt_tokens"], document["new_tokens"]) == (2, 8, 4)
    assert [(r["prompt_tokens"], r["decoded_tokens"]) for r in document["rounds"]] == [(16, 6)] * 3
    speeds = sorted(r["decoded_tokens"] / r["decode_seconds"] for r in document["rounds"])
    assert document["decode_tokens_per_second"] == pytest.approx(speeds[1])
    assert main(["bench", "generate", "model", *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"decode +[\d.,]+ tokens/s \(median\)", text)
    assert len(re.findall(r"^ +[123]( +[\d.,]+){2} *$", text, re.MULTILINE)) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_bench_generate_loads_the_model_in_the_dtype_that_was_asked_for(dtype, capsys, monkeypatch):
    loaded = []

    def load(source, dtype):
        loaded.append((source, None if dtype is None else dtype.name))
        return FadingMemoryModel(np.eye(11, dtype=np.float32))

    monkeypatch.setattr("moe_jax.pretrained.from_pretrained", load)
    options = ["--prompt-tokens", "2", "--new-tokens", "2", "--rounds", "1", *(("--dtype", dtype) if dtype else ())]
    assert main(["bench", "generate", "model", *options]) == 0
    assert loaded == [("model", dtype)]


def test_bench_moe_block_prints_median_fastest_and_slowest_in_milliseconds(capsys, monkeypatch):
    from moe_jax.benchmarking import moe_block_speed

    def measured(config, *, tokens, rounds):
        return dataclasses.replace(measure(config, tokens=tokens, rounds=rounds), seconds=(0.5, 0.002, 0.125))

    measure = moe_block_speed.measure_moe_block
    monkeypatch.setattr(moe_block_speed, "measure_moe_block", measured)
    sizes = ["--hidden-size", "16", "--intermediate-size", "8", "--experts", "4", "--top-k", "2"]
    assert main(["bench", "moe-block", *sizes, "--tokens", "3", "--rounds", "3"]) == 0
    assert re.search(r"^ +3 +125 +2 +500 ", capsys.readouterr().out, re.MULTILINE)


def test_bench_moe_block_measures_every_number_of_tokens(capsys):
    sizes = ["--hidden-size", "16", "--intermediate-size", "8", "--experts", "4", "--top-k", "2"]
    options = [*sizes, "--tokens", "3", "--tokens", "5", "--rounds", "3"]
    assert main(["bench", "moe-block", *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_experts"], document["dtype"], document["platform"]) == (4, "float32", "cpu")
    assert [(cell["tokens"], len(cell["seconds"])) for cell in document["cells"]] == [(3, 3), (5, 3)]
    for cell in document["cells"]:
        assert cell["flops"] == cell["tokens"] * 2 * (2 * 16 * 8 + 2 * 16 * 8 + 2 * 8 * 16)
        assert cell["median_seconds"] == sorted(cell["seconds"])[1]
        assert cell["gflops_per_second"] == pytest.approx(cell["flops"] / cell["median_seconds"] / 1e9)
    assert main(["bench", "moe-block", *sizes, "--tokens", "3"]) == 0
    assert len(re.findall(r"^ +3( +[\d.,e-]+){4} *$", capsys.readouterr().out, re.MULTILINE)) == 1


def test_bench_refuses_an_impossible_layer(capsys):
    assert main(["bench", "moe-block", "--experts", "4", "--top-k", "5"]) == 2
    assert "top_k must be in [1, 4]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("bench", "--debug", "moe-block"), ("bench", "moe-block", "--debug")], ids=" ".join
)
def test_debug_is_accepted_before_and_after_the_name_of_a_benchmark(arguments, capsys):
    assert main([*arguments, "--experts", "4", "--top-k", "5"]) == 2
    assert "Traceback" in capsys.readouterr().err
