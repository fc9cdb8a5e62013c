"""Does `transformers` load what `moe-jax export` writes, and is it the same model? (`make check-transformers`)

    .venv-golden/bin/python tests/transformers/check_transformers.py [--moe-jax .venv/bin/moe-jax] [family[/case] ...]

runs where torch and `transformers` are; the project's own command runs in its own environment, as a subprocess. Every
golden case, in every stored form, is converted and exported again in every form that its family has. Each export must

- load in `transformers` without a missing or unexpected tensor,
- give the logits that `expected.npz` holds, to 1e-6 of their standard deviation, and
- hold, if it has the source's form, the source's tensors bit for bit (those that a decoder drops excepted), or else
  the tensors of the case's own files in that form.

Prints a table; the exit status is the number of exports that failed, at most 100.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch  # noqa: TID251
import transformers
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.golden_cases import GoldenCase, cases_and_forms  # noqa: E402

MAX_LOGIT_ERROR = 1e-6
"""In standard deviations of the logits."""
PLAIN_FORM = {"per_expert": "per_expert", "fused": "fused", "mxfp4": "fused", "block_fp8": "per_expert"}
"""Stored form -> the form of its names once it is dequantized."""


class CheckError(Exception):
    """An export is not what it should be."""


def run(command: list[str]) -> None:
    """Run `command`; CheckError with the end of what it printed if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        message = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise CheckError(f"{command[1]} exited with {result.returncode}: {message[-1] if message else 'no message'}")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, sharded or not."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckError(f"no safetensors in {folder.name}")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def check_tensors(exported: Path, source: Path, dropped: tuple[str, ...]) -> int:
    """Compare names, dtypes and bytes; returns the number of tensors."""
    ours, theirs = read_tensors(exported), read_tensors(source)
    theirs = {name: tensor for name, tensor in theirs.items() if name not in dropped}
    if missing := sorted(theirs.keys() - ours.keys()):
        raise CheckError(f"{len(missing)} tensors are missing: {missing[0]}, ...")
    if surplus := sorted(ours.keys() - theirs.keys()):
        raise CheckError(f"{len(surplus)} tensors are too many: {surplus[0]}, ...")
    for name, tensor in theirs.items():
        if ours[name].dtype != tensor.dtype or ours[name].shape != tensor.shape:
            raise CheckError(
                f"{name} is {ours[name].dtype} {tuple(ours[name].shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise CheckError(f"{name} differs from the source")
    return len(theirs)


def check_logits(exported: Path, case: GoldenCase) -> float:
    """Load `exported` in `transformers`; returns the largest logit error in standard deviations."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise CheckError(f"transformers reports {kind}: {sorted(map(str, report[kind]))[0]}, ...")
    expected = case.expected()
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(expected.input_ids).long(), use_cache=False).logits.numpy()
    error = float(np.abs(logits - expected.logits).max() / expected.logits.std())
    if not error <= MAX_LOGIT_ERROR:
        raise CheckError(f"logits differ by {error:.1e} standard deviations")
    return error


def export_forms(case: GoldenCase) -> tuple[str, ...]:
    """The forms that `moe-jax export --form` can write for this family."""
    return ("fused",) if case.family == "gpt_oss" else ("per_expert", "fused")


def check_case(case: GoldenCase, form: str, command: str, scratch: Path) -> Iterator[tuple[str, bool, str]]:
    """Convert `form` of `case`, export it in every way; yields (exported form, passed, what was seen)."""
    converted = scratch / "converted"
    try:
        run([command, "convert", str(case.folder(form)), str(converted)])
    except CheckError as error:
        yield "-", False, str(error)
        return
    others = [target for target in export_forms(case) if target != PLAIN_FORM[form]]
    for target in ("source's", *others):
        exported = scratch / f"export-{target[:5]}"
        written = PLAIN_FORM[form] if target == "source's" else target
        options = [] if target == "source's" else ["--form", target]
        try:
            run([command, "export", str(converted), str(exported), *options])
            error = check_logits(exported, case)
            if written in case.forms:
                seen = f"{check_tensors(exported, case.folder(written), case.dropped_tensors)} tensors identical"
            else:
                seen = "no file to compare tensors with"
        except CheckError as failure:
            yield target, False, str(failure)
        else:
            yield target, True, f"logits within {error:.0e}, {seen}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="family[/case]", help="which cases to check (default: all)")
    parser.add_argument("--moe-jax", default=str(REPOSITORY / ".venv/bin/moe-jax"), help="the project's command")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pairs = [
        (case, form)
        for case, form in cases_and_forms()
        if not arguments.cases or case.family in arguments.cases or f"{case.family}/{case.name}" in arguments.cases
    ]
    if not pairs:
        raise SystemExit(f"no golden case matches {' '.join(arguments.cases)}")
    failures = total = 0
    print(f"{'case':<40} {'source form':<11} {'export':<11} result", flush=True)
    for case, form in pairs:
        with tempfile.TemporaryDirectory() as scratch:
            for target, passed, seen in check_case(case, form, arguments.moe_jax, Path(scratch)):
                total += 1
                failures += not passed
                print(f"{case!s:<40} {form:<11} {target:<11} {'ok' if passed else 'FAILED'}: {seen}", flush=True)
    print(f"{total - failures} of {total} exports passed (transformers {transformers.__version__})")
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main())
