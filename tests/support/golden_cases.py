"""The golden cases: checkpoints that Hugging Face `transformers` wrote, and what it computed from them.

`tests/golden/<family>/<case>/` holds one model. Every form of a case (per-expert tensors, fused tensors, quantized)
is another way of storing the *same* weights, so all of them share one `expected.npz`. Weights are stored in float32
unless `case.json` says otherwise, and everything in `expected.npz` was computed in float32: load models with
`dtype=float32` to compare.

    for case, form in cases_and_forms("mixtral", "qwen3_moe"):
        folder = case.folder(form)          # a Hugging Face folder: config.json, safetensors
        expected = case.expected()          # arrays, see `Expected`

`tests/golden/README.md` says how the files are made. This module needs numpy alone.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What `transformers` computed: eager attention, eager experts, float32, CPU.

    B prompts of the same length S; R prompts of different lengths, the longest N; V tokens in the vocabulary; G
    generated tokens; L MoE layers; K experts per token. Padding holds arbitrary token ids, and logits at padding are
    zero (meaningless).
    """

    input_ids: np.ndarray
    """[B, S] int32: prompts without padding."""
    logits: np.ndarray
    """[B, S, V] float32: logits of `input_ids`."""
    topk_ids: np.ndarray
    """[L, B, S, K] int32: experts chosen for `input_ids` in each MoE layer, ascending."""
    lengths: np.ndarray
    """[R] int32: real tokens of each ragged prompt."""
    left_input_ids: np.ndarray
    """[R, N] int32: the ragged prompts, padded on the left."""
    left_attention_mask: np.ndarray
    """[R, N] int32: 1 at real tokens."""
    left_logits: np.ndarray
    """[R, N, V] float32: logits with positions counted from the first real token."""
    right_input_ids: np.ndarray
    """[R, N] int32: the same prompts, padded on the right."""
    right_attention_mask: np.ndarray
    """[R, N] int32: 1 at real tokens."""
    right_logits: np.ndarray
    """[R, N, V] float32."""
    greedy_tokens: np.ndarray
    """[R, G] int32: greedy continuation of each ragged prompt, generated alone (no token ends it)."""

    def prompts(self) -> list[np.ndarray]:
        """The R ragged prompts without padding, each [length] int32."""
        return [row[:length] for row, length in zip(self.right_input_ids, self.lengths, strict=True)]


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """One model of one family, its stored forms and its expected results."""

    family: str
    """`model_type` of its config.json."""
    name: str
    """Name of the case, unique within the family; it says what the case covers."""

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    @property
    def root(self) -> Path:
        """Folder of the case."""
        return ROOT / self.family / self.name

    @property
    def description(self) -> Mapping[str, Any]:
        """`case.json`: what the case covers, how it was made, its forms and the tensors that a reader must drop."""
        return _read_json(self.root / "case.json")

    @property
    def forms(self) -> tuple[str, ...]:
        """Stored forms, some of "per_expert", "fused", "mxfp4" and "block_fp8"."""
        return tuple(self.description["forms"])

    def folder(self, form: str) -> Path:
        """Hugging Face folder of `form`; ValueError if the case does not have it."""
        if form not in self.forms:
            raise ValueError(f"{self} is stored as {', '.join(self.forms)}; got form={form!r}")
        return self.root / form

    def config(self, form: str | None = None) -> dict[str, Any]:
        """`config.json` of `form` (of the first form by default), as `transformers` 5 writes it."""
        return dict(_read_json(self.folder(form or self.forms[0]) / "config.json"))

    def hub_style_config(self, form: str | None = None) -> dict[str, Any]:
        """The same configuration as older, published checkpoints write it (`rope_theta`, `torch_dtype`, ...)."""
        config = dict(_read_json(self.root / "config_hub_style.json"))
        quantization = self.config(form).get("quantization_config")
        return config if quantization is None else {**config, "quantization_config": quantization}

    def write_hub_style_folder(self, form: str, destination: str | os.PathLike[str]) -> Path:
        """Copy `form` to the new folder `destination`, with the hub-style `config.json`; returns `destination`."""
        destination = Path(shutil.copytree(self.folder(form), destination))
        (destination / "config.json").write_text(json.dumps(self.hub_style_config(form), indent=2))
        return destination

    @property
    def dropped_tensors(self) -> tuple[str, ...]:
        """Tensors in the checkpoint that do not belong to the decoder (multi-token-prediction layers)."""
        return tuple(self.description["dropped_tensors"])

    def expected(self) -> Expected:
        """The results of `transformers` for this case."""
        return _read_expected(self.root / "expected.npz")


@cache
def _read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text())


@cache
def _read_expected(path: Path) -> Expected:
    with np.load(path, allow_pickle=False) as arrays:
        return Expected(**{field.name: arrays[field.name] for field in dataclasses.fields(Expected)})


def golden_cases(*families: str) -> list[GoldenCase]:
    """All cases, or those of `families`, sorted by family and name; ValueError for a family without cases."""
    cases = [GoldenCase(path.parent.parent.name, path.parent.name) for path in sorted(ROOT.glob("*/*/case.json"))]
    known = {case.family for case in cases}
    if unknown := set(families) - known:
        raise ValueError(f"no golden cases for {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return [case for case in cases if not families or case.family in families]


def golden_case(family: str, name: str) -> GoldenCase:
    """The case `name` of `family`; ValueError if there is none."""
    for case in golden_cases(family):
        if case.name == name:
            return case
    raise ValueError(f"{family} has the cases {', '.join(case.name for case in golden_cases(family))}; got {name!r}")


def cases_and_forms(*families: str) -> list[tuple[GoldenCase, str]]:
    """Every (case, form) pair, for `pytest.mark.parametrize("case, form", cases_and_forms(), ids=str)`."""
    return [(case, form) for case in golden_cases(*families) for form in case.forms]
