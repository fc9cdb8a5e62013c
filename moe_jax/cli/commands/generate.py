"""`moe-jax generate`: continue prompts, or answer them."""

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.cli import arguments as shared
from moe_jax.cli import exit_codes, processes

if TYPE_CHECKING:
    from moe_jax.generation import Generation, GenerationSettings
    from moe_jax.tokenization import Tokenizer

SUMMARY = "continue prompts, or answer them"
DESCRIPTION = """\
Continue one or several prompts. Without --prompt, every line of standard input is a prompt; none may be empty.

The checkpoint's generation_config.json says how tokens are chosen; --greedy, --temperature, --top-k, --top-p and
--repetition-penalty override it. The text of a single prompt is printed while it is generated; several prompts run in batches.
Remarks and speed go to standard error.

--mesh spreads the model over several devices. On several hosts, start the same command with --distributed on each;
docs/multihost.md has complete job files.
"""
EXAMPLES = """\
  moe-jax generate examples/demo_model --prompt "At dawn the crew" --max-new-tokens 40
  moe-jax generate MODEL --prompt "Once" --prompt "Twice" --greedy
  moe-jax generate MODEL --prompt "Write a haiku." --chat --temperature 0.7 --seed 1
  moe-jax generate MODEL --prompt "Hello" --stats expert_load.png
  cat questions.txt | moe-jax generate MODEL --chat --json > answers.json
  moe-jax generate MODEL --prompt - < story.txt
  moe-jax generate MODEL --prompt "Once" --mesh expert=4,data=2
  srun moe-jax generate MODEL --prompt "Once" --mesh expert=8,tensor=2 --distributed
"""

DEFAULT_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    shared.add_model(parser)
    shared.add_revision(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue; may be given several times; - stands for all of standard input",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=shared.positive_int,
        metavar="N",
        help="stop after N new tokens (default: the checkpoint's setting, or 128)",
    )
    parser.add_argument(
        "--batch",
        type=shared.positive_int,
        default=DEFAULT_BATCH,
        metavar="N",
        help=f"most prompts at once, which share the memory for their keys and values (default: {DEFAULT_BATCH})",
    )
    choice = parser.add_argument_group("how tokens are chosen")
    choice.add_argument("--greedy", action="store_true", help="always take the most likely token")
    choice.add_argument(
        "--temperature",
        type=shared.number,
        metavar="X",
        help="draw tokens; below 1 sharpens, above 1 flattens; 0 is --greedy",
    )
    choice.add_argument("--top-k", type=shared.positive_int, metavar="N", help="draw from the N most likely tokens")
    choice.add_argument(
        "--top-p", type=probability, metavar="P", help="draw from the smallest set that reaches probability P"
    )
    choice.add_argument(
        "--repetition-penalty",
        type=shared.number,
        metavar="X",
        help="above 1 makes tokens less likely that are in the prompt or were already generated; 1 switches it off",
    )
    choice.add_argument(
        "--ignore-generation-config",
        action="store_true",
        help="ignore the checkpoint's generation_config.json; end-of-sequence tokens then come from config.json",
    )
    choice.add_argument(
        "--seed", type=seed_number, default=0, metavar="N", help="seed of the random numbers (default: 0)"
    )
    chat = parser.add_argument_group("conversation")
    chat.add_argument("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    chat.add_argument("--system", metavar="TEXT", help="system message of the conversation (with --chat)")
    chat.add_argument(
        "--chat-option",
        action="append",
        type=chat_option,
        metavar="NAME=VALUE",
        help="variable of the chat template, such as enable_thinking=false (with --chat); may be given several times",
    )
    shared.add_dtype(parser)
    parser.add_argument(
        "--stats",
        type=Path,
        metavar="FILE",
        help="count how often each expert of each layer is chosen, and write that to a .png, .svg, .pdf, .json or .csv",
    )
    processes.add_arguments(parser)
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Generate; returns the exit status."""
    overrides = settings_of(arguments)
    prompts, names = checked_prompts(arguments)
    write_stats: Any = None
    if arguments.stats is not None:
        from moe_jax.cli.expert_load import writer_for

        write_stats = writer_for(arguments.stats)

    # What is slow to import, once the arguments are known to be right.
    from moe_jax.checkpoints import describe, resolve_source
    from moe_jax.checkpoints.checkpoint_json import read_checkpoint_json
    from moe_jax.checkpoints.file_names import CONFIG_NAME
    from moe_jax.generation import Generation, generate_batches, read_generation_settings
    from moe_jax.generation.text_generation import check_prompts, unpadded
    from moe_jax.pretrained import from_pretrained
    from moe_jax.tokenization import Tokenizer

    mesh = processes.join(arguments)
    folder = resolve_source(arguments.model, arguments.revision)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is not a folder")
    settings = read_generation_settings(
        folder, ignore_generation_config=arguments.ignore_generation_config, **overrides
    )
    tokenizer = Tokenizer.from_folder(folder)
    prompt_ids = [encode(tokenizer, prompt, arguments) for prompt in prompts]
    processes.check_agreement(prompt_ids, settings, arguments.seed)
    # Weights may take minutes to load, so what `config.json` tells is checked before.
    _, decoder = describe(read_checkpoint_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
    check_prompts(unpadded(prompt_ids, None), settings, decoder, names)
    if write_stats is not None and not decoder.moe_layers:
        raise ValueError("--stats counts how often experts are chosen, and no layer of the model has any")
    model = from_pretrained(folder, dtype=shared.dtype_named(arguments.dtype), mesh=mesh)
    prints = processes.is_first()
    if prints and mesh is not None:
        for remark in model.partitioning_remarks:
            print(remark, file=sys.stderr)

    printer = None
    if len(prompts) == 1 and not arguments.json:
        shown = None if arguments.chat else prompts[0]
        printer = StreamPrinter(tokenizer, prompt_ids[0], shown, silent=not prints)
    batches: list[Generation] = []
    texts: list[str] = []
    for batch in generate_batches(
        model,
        prompt_ids,
        settings,
        batch_size=arguments.batch,
        seed=arguments.seed,
        on_token=None if printer is None else printer.add,
        with_expert_load=write_stats is not None,
    ):
        first = len(texts)
        texts += [
            tokenizer.continuation(ids, batch.row(row))
            for row, ids in enumerate(prompt_ids[first : first + len(batch.lengths)])
        ]
        batches.append(batch)
        if prints and printer is None and not arguments.json:
            print_texts(prompts[first : len(texts)], texts[first:], chat=arguments.chat, after_others=first > 0)

    if not prints:
        return exit_codes.SUCCESS
    result = Generation.joined(batches, pad_token_id=settings.pad_token_id)
    if arguments.json:
        from moe_jax.cli.output import print_json

        print_json(as_json(arguments, settings, prompts, prompt_ids, texts, result))
    elif printer is not None:
        printer.finish()
    if write_stats is not None:
        tokens = f"{result.timing.prompt_tokens} prompt and {result.lengths.sum()} new tokens"
        title = f"Expert load of {folder.resolve().name}, {tokens}"
        write_stats(arguments.stats, result.expert_load, model.decoder.moe_layers, title)
        print(f"expert load written to {arguments.stats}", file=sys.stderr)
    print(speed_line(result), file=sys.stderr)
    return exit_codes.SUCCESS


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that the command line gives, as overrides of the checkpoint's."""
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    given = [f"--{name.replace('_', '-')}" for name, value in sampling.items() if value is not None]
    greedy = "--greedy" if arguments.greedy else "--temperature 0" if arguments.temperature == 0 else None
    if greedy == "--temperature 0":
        given.remove("--temperature")
    if greedy is not None and given:
        raise ValueError(f"{greedy} takes the most likely token and cannot be combined with {', '.join(given)}")
    always = {name: getattr(arguments, name) for name in ("max_new_tokens", "repetition_penalty")}
    if greedy is not None:
        return {**always, "do_sample": False}
    return {**always, "do_sample": True if given else None, **sampling}


def checked_prompts(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The prompts, and what messages call them; ValueError if they, or the conversation's options, cannot be used."""
    if arguments.distributed and (arguments.prompt is None or "-" in arguments.prompt):
        raise ValueError("--distributed needs --prompt TEXT: standard input does not reach every process")
    prompts = read_prompts(arguments.prompt)
    for option, value in (("--system", arguments.system), ("--chat-option", arguments.chat_option)):
        if value is not None and not arguments.chat:
            raise ValueError(f"{option} needs --chat")
    chat = [
        ("--system", arguments.system or ""),
        ("--chat-option", json.dumps(arguments.chat_option, ensure_ascii=False)),
    ]
    names = prompt_names(arguments.prompt, len(prompts))
    for name, text in [*zip(names, prompts, strict=True), *chat]:
        check_utf8(name, text)
    return prompts, names


def probability(text: str) -> float:
    """A probability from which tokens can be drawn, for `type=`."""
    value = shared.number(text)
    if not 0 < value <= 1:  # said so that NaN is refused
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, which draws from all tokens; got {value}")
    return value


def seed_number(text: str) -> int:
    """A seed that JAX takes, for `type=`."""
    value = shared.whole_number(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from -2^63 to 2^63 - 1, got {value}")
    return value


def chat_option(text: str) -> tuple[str, Any]:
    """A name and a value, which is taken as JSON if it is, for `type=`."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in ("messages", "add_generation_prompt"):
        raise argparse.ArgumentTypeError(
            f"must be like enable_thinking=false, with a name that the command doesn't set itself; got {text!r}"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def read_prompts(given: Sequence[str] | None) -> list[str]:
    """The prompts of `--prompt`, or the lines of standard input."""
    if given is None:
        if sys.stdin.isatty():
            raise ValueError("there is no prompt; give --prompt TEXT, or one prompt per line on standard input")
        return lines_of(standard_input())
    text = standard_input() if "-" in given else ""
    prompts = [text.removesuffix("\n") if prompt == "-" else prompt for prompt in given]
    for name, prompt in zip(prompt_names(given, len(prompts)), prompts, strict=True):
        if not prompt:
            raise ValueError(f"{name} is empty")
    return prompts


def prompt_names(given: Sequence[str] | None, count: int) -> list[str]:
    """What messages call each of the `count` prompts, whose `--prompt` are `given`; people count from 1."""
    if given is None:
        return [f"line {number} of standard input" for number in range(1, count + 1)]
    if count == 1:
        return ["the prompt"]
    return [f"prompt {number} of {count}" for number in range(1, count + 1)]


def standard_input() -> str:
    """All of standard input; bytes that are not text arrive as in arguments, for `check_utf8` to refuse."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin.read()


def lines_of(text: str) -> list[str]:
    """The lines of `text`, one prompt each, so that answers can be matched to lines by their number.

    Only a line feed ends a line: `str.splitlines` would break prompts at form feeds and U+2028, too.
    """
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    if not lines:
        raise ValueError("there is no prompt: standard input is empty")
    if "" in lines:
        raise ValueError(f"line {lines.index('') + 1} of standard input is empty, and every line is a prompt")
    return lines


def check_utf8(name: str, text: str) -> None:
    """ValueError if `text`, which messages call `name`, was read from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise ValueError(f"{name} is not valid UTF-8 after {before!r}") from error


def encode(tokenizer: "Tokenizer", prompt: str, arguments: argparse.Namespace) -> list[int]:
    """Token ids of a prompt, as a conversation with `--chat`."""
    if not arguments.chat:
        return tokenizer.encode(prompt)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return tokenizer.encode_chat([*system, {"role": "user", "content": prompt}], **dict(arguments.chat_option or ()))


class StreamPrinter:
    """Prints one row's text on standard output while it is generated."""

    def __init__(
        self, tokenizer: "Tokenizer", prompt_ids: Sequence[int], shown_prompt: str | None, *, silent: bool = False
    ):
        """Show `shown_prompt`, if there is one, when the first token arrives.

        A silent printer prints nothing: all processes of a job must generate token by token if one of them does.
        """
        from moe_jax.tokenization import TextStream

        self._stream = TextStream(tokenizer, prompt_ids)
        self._pending = "" if shown_prompt is None else emphasized(shown_prompt)
        self._silent = silent

    def add(self, row: int, token: int) -> None:
        """Print what this token completes."""
        del row  # there is one
        self._write(self._pending + self._stream.add(token))
        self._pending = ""

    def finish(self) -> None:
        """Print what is left, and end the line."""
        self._write(self._stream.finish() + "\n")

    def _write(self, text: str) -> None:
        if not self._silent:
            sys.stdout.write(text)
            sys.stdout.flush()


def emphasized(prompt: str) -> str:
    """The prompt in bold on a terminal, so that what was generated stands apart."""
    from moe_jax.cli.output import stdout_console

    console = stdout_console()
    return f"\x1b[1m{prompt}\x1b[0m" if console.is_terminal and not console.no_color else prompt


def print_texts(prompts: Sequence[str], texts: Sequence[str], *, chat: bool, after_others: bool) -> None:
    """Print several prompts with what follows each, an empty line between them and after those printed before."""
    blocks = [
        f"{emphasized(f'> {prompt}')}\n{text}" if chat else emphasized(prompt) + text
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    print("\n" * after_others + "\n\n".join(blocks), flush=True)


def speed_line(result: "Generation") -> str:
    """One line that says how long everything took. The first new token of each prompt comes with the prompt, not by decoding."""
    from moe_jax.cli.output import format_seconds

    timing = result.timing
    new_tokens = f"{result.lengths.sum()} new tokens"
    if timing.decoded_tokens:
        new_tokens += (
            f", {timing.decoded_tokens} of them decoded in {format_seconds(timing.decode_seconds)} "
            f"({timing.decode_tokens_per_second:,.1f} tokens/s)"
        )
    return (
        f"{timing.prompt_tokens} prompt tokens in {format_seconds(timing.prefill_seconds)} "
        f"({timing.prefill_tokens_per_second:,.0f} tokens/s); {new_tokens}; "
        f"compiled in {format_seconds(timing.compile_seconds)}"
    )


def as_json(
    arguments: argparse.Namespace,
    settings: "GenerationSettings",
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    texts: Sequence[str],
    result: "Generation",
) -> dict[str, Any]:
    """Everything about a generation."""
    return {
        "model": arguments.model,
        "seed": arguments.seed,
        "settings": dataclasses.asdict(settings),
        "results": [
            {
                "prompt": prompt,
                "text": text,
                "finish_reason": result.finish_reasons[row],
                "prompt_token_ids": list(prompt_ids[row]),
                "token_ids": result.row(row),
            }
            for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ],
        "timing": {
            **dataclasses.asdict(result.timing),
            "prefill_tokens_per_second": result.timing.prefill_tokens_per_second,
            "decode_tokens_per_second": result.timing.decode_tokens_per_second,
        },
    }
