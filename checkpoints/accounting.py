"""Every tensor of a checkpoint accounted for: expected and right, left out on purpose, or a problem."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import numpy as np

from moe_jax.families import Decoder, Family
from moe_jax.families.names import CheckpointForm

from .dtypes import WEIGHT_DTYPES
from .layout import Shape
from .mxfp4 import GROUP, GROUP_BYTES
from .quantization_config import MXFP4, BlockFP8, Quantization
from .safetensors_file import TensorEntry
from .stored_rows import FLOAT8, SCALE_DTYPES, BlockFP8Rows, MXFP4Rows, PlainRows, StoredRows, block_grid
from .tensor_plan import FORMS, StoredTensor, TensorPlan, plan_tensors

OUTPUT_TABLE = "lm_head.kernel"
ROTARY_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")
PREDICTION_TENSOR = "eh_proj.weight"
"""What every layer for multi-token prediction has and no other: it joins a hidden state and the next token's embedding."""
SCALE_SUFFIX = "_scale_inv"
BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"

_UINT8 = np.dtype(np.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accounting:
    """What a checkpoint's tensors are."""

    rows: Mapping[str, StoredRows]
    """Name in the plan -> its numbers; incomplete if there are problems."""
    dropped: Mapping[str, str]
    """Tensors left out on purpose -> why."""
    problems: tuple[str, ...]
    """Everything that is missing, unexpected or wrong, one line each."""


def detect_form(family: Family, decoder: Decoder, tensors: Mapping[str, TensorEntry]) -> TensorPlan:
    """The plan of the form whose expert tensors are there; of the family's usual form when neither's are."""
    plans = [
        plan_tensors(decoder, family, form)
        for form in sorted(FORMS, key=lambda form: form != family.native_form)
        if form == "fused" or family.experts.per_expert_block is not None
    ]

    def present(plan: TensorPlan) -> int:
        names = (t.name for path, group in plan.tensors.items() if "routed_experts" in path for t in group)
        return sum(name in tensors or f"{name}{BLOCKS_SUFFIX}" in tensors for name in names)

    # Counted in parameters covered, so that one fused tensor weighs as much as the per-expert ones of a whole layer.
    return max(plans, key=lambda plan: present(plan) / max(1, sum("routed_experts" in t.path for t in plan)))


def account(
    plan: TensorPlan,
    family: Family,
    decoder: Decoder,
    tensors: Mapping[str, TensorEntry],
    quantization: Quantization | None,
    prediction_layers: int,
) -> Accounting:
    """Compare the tensors that are there with the plan; so many layers after the decoder's may be left out."""
    matcher = _Matcher(tensors, quantization)
    rows: dict[str, StoredRows] = {}
    for stored in plan:
        if (found := matcher.match(stored)) is not None:
            rows[stored.name] = found
    problems = matcher.problems + list(_mixed_dtypes(plan, rows))
    dropped: dict[str, str] = {}
    left_out = _prediction_layers(tensors, family, len(decoder.layers), prediction_layers)
    for name, entry in tensors.items():
        if name in matcher.used:
            continue
        reason = _reason_to_drop(name, family, decoder, left_out)
        if reason is None:
            problems.append(f"{entry.file}: {name}: unexpected tensor, {_form_phrase(plan.form)} has none of that name")
        else:
            dropped[name] = reason
    return Accounting(rows=rows, dropped=dropped, problems=tuple(problems))


def _form_phrase(form: CheckpointForm) -> str:
    return f"a checkpoint of this configuration in the {form} form"


def _prediction_layers(tensors: Iterable[str], family: Family, depth: int, most: int) -> set[int]:
    """Numbers of the layers for multi-token prediction, of which there are at most so many after the decoder's.

    Each must look like one, too: a number of layers that is too small would make it of a layer of the decoder.
    """
    numbers = {_layer_number(name, family) for name in tensors if name.endswith(f".{PREDICTION_TENSOR}")}
    return {number for number in numbers if number is not None and depth <= number < depth + most}


def _reason_to_drop(name: str, family: Family, decoder: Decoder, prediction_layers: set[int]) -> str | None:
    for pattern in family.dropped:
        if re.fullmatch(pattern, name):
            return f"left out in {family.model_type}"
    layer = _layer_number(name, family)
    if layer in prediction_layers:
        return f"layer {layer} of a decoder with {len(decoder.layers)} layers (multi-token prediction)"
    if ROTARY_BUFFERS.fullmatch(name):
        return "rotary frequencies follow from the configuration"
    if decoder.tie_word_embeddings and name == family.names.get(OUTPUT_TABLE):
        return "tied to the embedding table"
    return None


def _layer_number(name: str, family: Family) -> int | None:
    prefixes = {template.partition("{layer}")[0] for template in family.names.values() if "{layer}" in template}
    for prefix in prefixes:
        if match := re.match(re.escape(prefix) + r"(\d+)\.", name):
            return int(match[1])
    return None


def _mixed_dtypes(plan: TensorPlan, rows: Mapping[str, StoredRows]) -> Iterator[str]:
    """One of our parameters has one dtype, so the tensors that make it up must agree."""
    for path, group in plan.tensors.items():
        dtypes = {t.name: cast(np.dtype, rows[t.name].dtype) for t in group if t.name in rows and rows[t.name].dtype}
        if len(set(dtypes.values())) > 1:
            first = next(iter(dtypes))
            other = next(name for name, dtype in dtypes.items() if dtype != dtypes[first])
            yield f"{path}: its tensors differ in dtype: {first} is {dtypes[first]}, {other} is {dtypes[other]}"


class _Matcher:
    """Finds the tensor or tensors that hold a planned one, and notes what is wrong with them."""

    def __init__(self, tensors: Mapping[str, TensorEntry], quantization: Quantization | None) -> None:
        self.tensors = tensors
        self.quantization = quantization
        self.problems: list[str] = []
        self.used: set[str] = set()

    def match(self, stored: StoredTensor) -> StoredRows | None:
        """The rows of a planned tensor, or None after noting why it cannot be read."""
        if stored.packed_layout is not None and f"{stored.name}{BLOCKS_SUFFIX}" in self.tensors:
            return self._match_mxfp4(stored)
        entry = self._take(stored.name)
        if entry is None:
            self.problems.append(f"{stored.name}: missing")
            return None
        shape_is_right = self._check_shape(entry, stored.shape)
        if entry.dtype == FLOAT8:
            return self._match_fp8(stored, entry) if shape_is_right else None
        if entry.dtype not in WEIGHT_DTYPES:
            self._wrong_dtype(entry, (*WEIGHT_DTYPES, *([FLOAT8] if isinstance(self.quantization, BlockFP8) else [])))
            return None
        return PlainRows(entry) if shape_is_right else None

    def _match_fp8(self, stored: StoredTensor, weights: TensorEntry) -> StoredRows | None:
        scales = self._take(stored.name + SCALE_SUFFIX)
        if len(stored.shape) < 2:
            self.problems.append(
                f"{weights.file}: {weights.name}: is {FLOAT8}, which needs a matrix; its shape is {list(stored.shape)}"
            )
            return None
        if not isinstance(self.quantization, BlockFP8):
            self.problems.append(
                f"{weights.file}: {weights.name}: is {FLOAT8}, but config.json has no quantization_config of method fp8"
            )
            return None
        if scales is None:
            self.problems.append(f"{stored.name}{SCALE_SUFFIX}: missing, but {stored.name} is {FLOAT8}")
            return None
        block = self.quantization.block
        if block is None:
            one_each = stored.shape[:-2]
            fits = scales.shape in ((*one_each,), (*one_each, 1), (*one_each, 1, 1))
            if not fits:
                self.problems.append(
                    f"{scales.file}: {scales.name}: shape must be {list(one_each)} (one multiplier per matrix), "
                    f"got {list(scales.shape)}"
                )
            block = (stored.shape[-2], stored.shape[-1])
        else:
            fits = self._check_shape(scales, block_grid(stored.shape, block))
        if scales.dtype not in SCALE_DTYPES:
            self._wrong_dtype(scales, SCALE_DTYPES)
            return None
        return BlockFP8Rows(weights, scales, block) if fits else None

    def _match_mxfp4(self, stored: StoredTensor) -> StoredRows | None:
        blocks = self._take(stored.name + BLOCKS_SUFFIX)
        scales = self._take(stored.name + SCALES_SUFFIX)
        if not isinstance(self.quantization, MXFP4):
            self.problems.append(
                f"{stored.name}{BLOCKS_SUFFIX}: found, but config.json has no quantization_config of method mxfp4"
            )
            return None
        if blocks is None or scales is None:
            self.problems.append(f"{stored.name}{SCALES_SUFFIX}: missing, but {stored.name}{BLOCKS_SUFFIX} is there")
            return None
        assert stored.packed_layout is not None
        *leading, columns = stored.packed_layout.stored_shape(stored.region_shape)
        groups = -(-columns // GROUP)
        if columns % GROUP:
            self.problems.append(
                f"{blocks.file}: {blocks.name}: MXFP4 needs a multiple of {GROUP} inputs, got {columns}"
            )
        fits = [
            self._check_shape(blocks, (*leading, groups, GROUP_BYTES)),
            self._check_shape(scales, (*leading, groups)),
        ]
        for entry in (blocks, scales):
            if entry.dtype != _UINT8:
                self._wrong_dtype(entry, (_UINT8,))
                fits.append(False)
        return MXFP4Rows(blocks, scales) if all(fits) and columns % GROUP == 0 else None

    def _take(self, name: str) -> TensorEntry | None:
        self.used.add(name)
        return self.tensors.get(name)

    def _check_shape(self, entry: TensorEntry, expected: Shape) -> bool:
        if entry.shape != expected:
            self.problems.append(f"{entry.file}: {entry.name}: shape must be {list(expected)}, got {list(entry.shape)}")
        return entry.shape == expected

    def _wrong_dtype(self, entry: TensorEntry, legal: tuple[np.dtype, ...]) -> None:
        names = ", ".join(dtype.name for dtype in legal)
        self.problems.append(f"{entry.file}: {entry.name}: dtype must be one of {names}; got {entry.dtype.name}")
