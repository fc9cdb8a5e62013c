"""The tensors of a Hugging Face folder: which files hold them, and whether index and files agree."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from .checkpoint_json import read_checkpoint_json
from .errors import CheckpointError
from .file_names import INDEX_NAME, SINGLE_NAME
from .safetensors_file import TensorEntry, read_header

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def list_tensors(folder: Path) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor of the checkpoint in `folder`.

    The files are `model.safetensors`, else those of `model.safetensors.index.json`, else every `*.safetensors`. An index
    counts beside `model.safetensors`, too, if that is one of the files that it names.

    Raises:
        CheckpointError: With every problem found: absent or damaged files, paths outside the folder, an index that
            disagrees with the files, a tensor in two files, or a folder that has only pickles.
    """
    weight_map = _weight_map(folder)
    problems: list[str] = []
    files = _files(folder, weight_map, problems)
    tensors: dict[str, TensorEntry] = {}
    readable: set[Path] = set()
    for file in files:
        try:
            entries = read_header(file)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        readable.add(file)
        for entry in entries:
            if entry.name in tensors:
                problems.append(f"{file}: {entry.name}: is also in {tensors[entry.name].file.name}")
            tensors.setdefault(entry.name, entry)
    if weight_map is not None:
        problems += _disagreements(folder, weight_map, tensors, readable)
    if problems:
        raise CheckpointError(f"{folder}: the checkpoint's files cannot be used:", problems)
    return tensors


def has_weights(folder: Path) -> bool:
    """Whether the files of weights that `model.safetensors.index.json` names, or the single one, are all there."""
    if (folder / SINGLE_NAME).exists():
        return True
    weight_map = _weight_map(folder)
    return bool(weight_map) and all((folder / name).exists() for name in set(weight_map.values()))


def _weight_map(folder: Path) -> Mapping[str, str] | None:
    """The index's tensor name -> file name; None without an index, or with one that is a leftover.

    `transformers` takes `model.safetensors` first, and leaves the index where it is when it saves a model of several files
    again as one.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        return None
    weight_map = read_checkpoint_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must be an object of tensor name -> file name")
    is_leftover = (folder / SINGLE_NAME).exists() and SINGLE_NAME not in weight_map.values()
    return None if is_leftover else weight_map


def _files(folder: Path, weight_map: Mapping[str, str] | None, problems: list[str]) -> list[Path]:
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).exists():
        names = [SINGLE_NAME]
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(_no_weights(folder))
    files = []
    for name in names:
        file = folder / name
        if weight_map is not None and not _is_inside(name):
            problems.append(f"{folder / INDEX_NAME}: names {name!r}, outside the folder")
        elif not _stays_inside(folder, name):
            problems.append(
                f"{file}: is a link to {file.resolve()}, outside the folder; name the folder of the file itself"
            )
        elif not file.exists():
            problems.append(f"{file}: does not exist, but {INDEX_NAME} names it")
        else:
            files.append(file)
    return files


def _is_inside(name: str) -> bool:
    """Whether `name`, as it is written, is that of a file inside a folder."""
    pure = PurePosixPath(name)
    return not (pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name)


def _stays_inside(folder: Path, name: str) -> bool:
    """Whether `name` leads to a file inside `folder`, links followed.

    In the Hugging Face cache a snapshot consists of links into `blobs` beside `snapshots`: that is inside, too.
    """
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    return any((root / name).resolve().is_relative_to(allowed) for allowed in inside)


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder}: only has pickled weights ({', '.join(pickles[:3])}); they are refused, because opening "
            "a pickle runs whatever code it contains. Save the model as safetensors first"
        )
    return f"{folder}: has no *.safetensors file"


def _disagreements(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry], readable: set[Path]
) -> list[str]:
    index = folder / INDEX_NAME
    problems = []
    for name, file in weight_map.items():
        actual = tensors.get(name)
        if actual is None:
            if folder / file in readable:
                problems.append(f"{folder / file}: {name}: is missing, but {INDEX_NAME} says it is there")
        elif actual.file != folder / file:
            problems.append(f"{index}: {name}: said to be in {file}, is in {actual.file.name}")
    problems += [
        f"{entry.file}: {name}: is not listed in {INDEX_NAME}"
        for name, entry in tensors.items()
        if name not in weight_map
    ]
    return problems
