"""`moe-jax generate` and `moe-jax bench generate`, with a model whose tokens are known."""

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from support import small_tokenizers
from support.fading_memory_model import FadingMemoryModel, expected_greedy, expected_load, expected_penalized
from support.golden_cases import golden_cases
from support.small_tokenizers import CHATML, END_OF_TEXT

from moe_jax.cli import main
from moe_jax.tokenization import Tokenizer

VOCAB = 257
NEW_TOKENS = 6
LIMIT = ("--max-new-tokens", str(NEW_TOKENS))
SPEED = re.compile(
    r"\d+ prompt tokens in .*\(.* tokens/s\); (\d+) new tokens, (\d+) of them decoded in .*; compiled in .* s\n"
)


class Checkpoint:
    """A folder whose model is a `FadingMemoryModel`, and what it must say."""

    def __init__(self, folder, table):
        self.folder, self.table = folder, table
        self.decoder = FadingMemoryModel(table, max_positions=100).decoder
        self.loaded_with = []
        small_tokenizers.write(small_tokenizers.byte_level(), folder, eos_token=END_OF_TEXT, chat_template=CHATML)
        (folder / "config.json").write_text("{}")
        self.tokenizer = Tokenizer.from_folder(folder)

    def from_pretrained(self, folder, *, dtype, mesh=None):
        assert folder == self.folder
        assert mesh is None
        self.loaded_with.append(dtype)
        return FadingMemoryModel(self.table, self.decoder.max_positions)

    def tokens(self, prompt):
        return expected_greedy(self.table, self.tokenizer.encode(prompt), NEW_TOKENS)

    def text(self, prompt):
        return self.tokenizer.decode(self.tokens(prompt))


@pytest.fixture
def checkpoint(tmp_path, rng, monkeypatch):
    table = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)
    table[:, 94:] -= 100  # ASCII only: the byte-level alphabet begins with it
    checkpoint = Checkpoint(tmp_path, table)
    monkeypatch.setattr("moe_jax.pretrained.from_pretrained", checkpoint.from_pretrained)
    monkeypatch.setattr("moe_jax.checkpoints.describe", lambda config, where: (None, checkpoint.decoder))
    return checkpoint


def run(checkpoint, *arguments, status=0):
    assert main(["generate", str(checkpoint.folder), *arguments]) == status


def give_stdin(monkeypatch, text, *, is_terminal=False):
    """Standard input as a process has it, of these bytes or this text."""
    content = text if isinstance(text, bytes) else text.encode()
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="\n")
    stdin.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdin", stdin)


def test_one_prompt_is_printed_with_its_continuation_and_the_speed_goes_to_stderr(checkpoint, capsys):
    run(checkpoint, "--prompt", "Hello, sea", *LIMIT)
    captured = capsys.readouterr()
    assert captured.out == f"Hello, sea{checkpoint.text('Hello, sea')}\n"
    assert SPEED.fullmatch(captured.err)


def test_several_prompts_stand_apart(checkpoint, capsys):
    run(checkpoint, "--prompt", "one", "--prompt", "and another", *LIMIT)
    assert capsys.readouterr().out == f"one{checkpoint.text('one')}\n\nand another{checkpoint.text('and another')}\n"


def test_lines_of_standard_input_are_prompts(checkpoint, capsys, monkeypatch):
    give_stdin(monkeypatch, "first\n second one\n \nlast")
    run(checkpoint, "--json", *LIMIT)
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["prompt"] for result in results] == ["first", " second one", " ", "last"]


def test_only_a_line_feed_ends_a_line_of_standard_input(checkpoint, capsys, monkeypatch):
    lines = ["form\ffeed", "line\u2028separator", "next\x85line", "group\x1dseparator", "carriage\rreturn"]
    give_stdin(monkeypatch, "\r\n".join([*lines, ""]))
    run(checkpoint, "--json", *LIMIT)
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["prompt"] for result in results] == lines


@pytest.mark.parametrize(("text", "number"), [("a\n\nb\n", 2), ("\n", 1), ("a\r\n\r\n", 2), ("a\nb\n\n", 3)], ids=repr)
def test_an_empty_line_of_standard_input_is_refused_with_its_number(checkpoint, capsys, monkeypatch, text, number):
    give_stdin(monkeypatch, text)
    run(checkpoint, status=2)
    assert f"line {number} of standard input is empty" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [(), ("--prompt", "-")], ids=["lines", "whole"])
def test_standard_input_that_is_not_utf8_is_refused(checkpoint, capsys, monkeypatch, arguments):
    give_stdin(monkeypatch, b"tea\ncaf\xe9\n")
    run(checkpoint, *arguments, status=2)
    name = "the prompt" if arguments else "line 2 of standard input"
    assert re.fullmatch(rf"moe-jax generate: {name} is not valid UTF-8 after '.*caf'\n", capsys.readouterr().err)
    assert checkpoint.loaded_with == []


def test_a_dash_is_the_whole_of_standard_input(checkpoint, capsys, monkeypatch):
    give_stdin(monkeypatch, "first\n\nsecond\n")
    run(checkpoint, "--json", "--prompt", "-", *LIMIT)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["prompt"] == "first\n\nsecond"


def prompts_of_all_lengths(rng, count):
    return ["".join(rng.choice(list("abcdef"), size=int(size))) for size in rng.integers(1, 40, size=count)]


@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_prompts_run_in_batches_and_are_printed_in_their_order(checkpoint, capsys, monkeypatch, rng, batch):
    prompts = prompts_of_all_lengths(rng, 8)
    give_stdin(monkeypatch, "\n".join(prompts))
    run(checkpoint, "--batch", str(batch), *LIMIT)
    captured = capsys.readouterr()
    assert captured.out == "\n\n".join(prompt + checkpoint.text(prompt) for prompt in prompts) + "\n"
    assert SPEED.fullmatch(captured.err)


def test_what_is_drawn_does_not_depend_on_the_size_of_batches(checkpoint, capsys, monkeypatch, rng):
    prompts = [*prompts_of_all_lengths(rng, 4), "same", "same", "same"]
    documents = []
    for batch in ("2", "7"):
        give_stdin(monkeypatch, "\n".join(prompts))
        stats = checkpoint.folder / f"load{batch}.json"
        options = ("--temperature", "50", "--seed", "3", "--json", "--stats", str(stats), *LIMIT)
        run(checkpoint, "--batch", batch, *options)
        documents.append((json.loads(capsys.readouterr().out)["results"], read_stats(stats).tolist()))
    assert documents[0] == documents[1]
    last = [tuple(result["token_ids"]) for result in documents[0][0][-3:]]
    assert len(set(last)) == 3


def test_the_model_is_not_loaded_if_one_of_the_prompts_is_too_long(checkpoint, capsys, monkeypatch):
    give_stdin(monkeypatch, "ab\n" + "x" * 99)
    run(checkpoint, "--batch", "1", "--max-new-tokens", "2", status=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "line 2 of standard input takes 99 of the model's 100 positions, which leaves 1 for new tokens, not 2"
        in captured.err
    )
    assert checkpoint.loaded_with == []


def test_the_speed_counts_all_new_tokens_and_tells_how_many_were_decoded(checkpoint, capsys):
    run(checkpoint, "--prompt", "one", "--prompt", "and another", "--prompt", "third", *LIMIT)
    counts = SPEED.fullmatch(capsys.readouterr().err)
    assert counts.groups() == (str(3 * NEW_TOKENS), str(3 * (NEW_TOKENS - 1)))


def test_the_speed_of_single_tokens_says_nothing_of_decoding(checkpoint, capsys):
    run(checkpoint, "--prompt", "one", "--prompt", "and another", "--max-new-tokens", "1")
    assert re.search(r"tokens/s\); 2 new tokens; compiled in .* s\n$", capsys.readouterr().err)


def test_more_new_tokens_than_fit_are_clipped_if_the_checkpoint_asks_for_them(checkpoint, capsys):
    (checkpoint.folder / "generation_config.json").write_text('{"max_new_tokens": 16384}')
    run(checkpoint, "--prompt", "x" * 93, "--json")
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert len(result["token_ids"]) == 7


def test_a_setting_without_effect_does_not_stop_greedy_decoding(checkpoint, capsys):
    (checkpoint.folder / "generation_config.json").write_text('{"do_sample": true, "top_p": 7}')
    run(checkpoint, "--prompt", "ab", "--greedy", *LIMIT)
    assert capsys.readouterr().out == f"ab{checkpoint.text('ab')}\n"
    run(checkpoint, "--prompt", "ab", *LIMIT, status=2)
    assert re.search(r"generation_config\.json: top_p must be in", capsys.readouterr().err)


def test_chat_options_are_variables_of_the_template(checkpoint, capsys):
    template = "{{ messages[0].content }}|{{ thinking }}|{{ effort }}|{{ tools[0] }}|{{ eos_token }}"
    (checkpoint.folder / "chat_template.jinja").write_text(template)
    options = ["thinking=false", "effort=high", 'tools=["f"]', "eos_token=x=y"]
    chat = ("--chat", *(word for option in options for word in ("--chat-option", option)))
    run(checkpoint, *chat, "--prompt", "Hi", "--json", *LIMIT)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["prompt_token_ids"] == checkpoint.tokenizer.encode("Hi|False|high|f|x=y")


@pytest.mark.parametrize("option", ["thinking", "=1", "messages=[]", "add_generation_prompt=false", "a b=1"])
def test_a_chat_option_without_a_usable_name_is_wrong_usage(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "absent", "--prompt", "x", "--chat", "--chat-option", option])
    assert ended.value.code == 2
    assert "argument --chat-option: must be like enable_thinking=false" in capsys.readouterr().err


def test_json_holds_tokens_texts_reasons_settings_and_timing(checkpoint, capsys):
    run(checkpoint, "--prompt", "ab", "--prompt", "cde", "--json", "--seed", "5", *LIMIT)
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"model", "seed", "settings", "results", "timing"}
    assert (document["model"], document["seed"]) == (str(checkpoint.folder), 5)
    assert document["settings"]["max_new_tokens"] == NEW_TOKENS
    assert document["settings"]["do_sample"] is False
    assert document["results"] == [
        {
            "prompt": prompt,
            "text": checkpoint.text(prompt),
            "finish_reason": "length",
            "prompt_token_ids": checkpoint.tokenizer.encode(prompt),
            "token_ids": checkpoint.tokens(prompt),
        }
        for prompt in ("ab", "cde")
    ]
    assert document["timing"]["prompt_tokens"] == 5
    assert document["timing"]["decoded_tokens"] == 2 * (NEW_TOKENS - 1)
    assert document["timing"]["decode_tokens_per_second"] > 0


def test_generation_ends_where_the_checkpoint_says_so(checkpoint, capsys):
    end = checkpoint.tokens("ab")[1]
    (checkpoint.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, end]}))
    run(checkpoint, "--prompt", "ab", "--json", *LIMIT)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["finish_reason"] == "eos"
    assert result["token_ids"] == expected_greedy(
        checkpoint.table, checkpoint.tokenizer.encode("ab"), NEW_TOKENS, (256, end)
    )


def test_chat_puts_prompt_and_system_message_into_the_template_and_shows_the_answer_alone(checkpoint, capsys):
    conversation = f"<|system|>Be brief.{END_OF_TEXT}\n<|user|>Hi{END_OF_TEXT}\n<|assistant|>"
    run(checkpoint, "--chat", "--system", "Be brief.", "--prompt", "Hi", *LIMIT)
    assert capsys.readouterr().out == checkpoint.text(conversation) + "\n"
    run(checkpoint, "--chat", "--system", "Be brief.", "--prompt", "Hi", "--json", *LIMIT)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["prompt_token_ids"] == checkpoint.tokenizer.encode(conversation)


def test_sampling_options_replace_the_checkpoints_and_a_seed_repeats_them(checkpoint, capsys):
    options = ("--prompt", "ab", "--temperature", "50", "--top-k", "40", "--json", *LIMIT)
    tokens = []
    for seed in ("1", "1", "2"):
        run(checkpoint, *options, "--seed", seed)
        document = json.loads(capsys.readouterr().out)
        tokens.append(document["results"][0]["token_ids"])
    settings = document["settings"]
    assert (settings["do_sample"], settings["temperature"], settings["top_k"], settings["top_p"]) == (
        True,
        50,
        40,
        None,
    )
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize("option", [("--greedy",), ("--temperature", "0")], ids=lambda option: option[0])
def test_greedy_replaces_a_checkpoint_that_samples(checkpoint, capsys, option):
    (checkpoint.folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 9.0}')
    run(checkpoint, "--prompt", "ab", *option, *LIMIT)
    assert capsys.readouterr().out == f"ab{checkpoint.text('ab')}\n"


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", jnp.bfloat16), ("float32", jnp.float32), (None, None)])
def test_the_dtype_is_passed_on(checkpoint, name, dtype):
    run(checkpoint, "--prompt", "ab", *(("--dtype", name) if name else ()), *LIMIT)
    assert checkpoint.loaded_with == [dtype]


def test_without_a_limit_generation_stops_at_the_models_positions(checkpoint, capsys):
    run(checkpoint, "--prompt", "x" * 93, "--json")
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert len(result["token_ids"]) == 7


def read_stats(path):
    if path.suffix == ".json":
        return np.array(json.loads(path.read_text())["expert_load"])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    load = np.zeros((3, 5), int)
    for row in rows:
        load[int(row["layer"]), int(row["expert"])] = row["load"]
    return load


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_stats_count_the_experts_of_prompts_and_new_tokens(checkpoint, ending, capsys):
    file = checkpoint.folder / f"load.{ending}"
    run(checkpoint, "--prompt", "abc", "--stats", str(file), *LIMIT)
    tokens_read = checkpoint.tokenizer.encode("abc") + checkpoint.tokens("abc")[:-1]
    np.testing.assert_array_equal(read_stats(file), expected_load(tokens_read))
    assert f"expert load written to {file}" in capsys.readouterr().err


def test_the_ending_of_a_file_of_stats_may_be_in_capitals(checkpoint):
    file = checkpoint.folder / "LOAD.JSON"
    run(checkpoint, "--prompt", "abc", "--stats", str(file), *LIMIT)
    tokens_read = checkpoint.tokenizer.encode("abc") + checkpoint.tokens("abc")[:-1]
    np.testing.assert_array_equal(json.loads(file.read_text())["expert_load"], expected_load(tokens_read))


def test_remarks_on_what_a_mesh_does_not_split_go_to_stderr(checkpoint, capsys, monkeypatch):
    def load(folder, *, dtype, mesh):
        model = FadingMemoryModel(checkpoint.table, checkpoint.decoder.max_positions)
        model.partitioning_remarks = ("2 heads cannot be split over 4 ranks",)
        return model

    monkeypatch.setattr("moe_jax.pretrained.from_pretrained", load)
    run(checkpoint, "--prompt", "ab", "--mesh", "tensor=4", *LIMIT)
    captured = capsys.readouterr()
    assert captured.out == f"ab{checkpoint.text('ab')}\n"
    assert captured.err.startswith("2 heads cannot be split over 4 ranks\n")


def test_stats_of_a_model_without_experts_are_refused_before_it_is_loaded(checkpoint, capsys):
    checkpoint.decoder = dataclasses.replace(checkpoint.decoder, moe_layers=())
    run(checkpoint, "--prompt", "abc", "--stats", str(checkpoint.folder / "load.json"), *LIMIT, status=2)
    captured = capsys.readouterr()
    assert (captured.out, "no layer of the model has any" in captured.err) == ("", True)
    assert checkpoint.loaded_with == []


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_stats_are_drawn_as_a_picture(checkpoint, ending, magic):
    file = checkpoint.folder / f"load.{ending}"
    run(checkpoint, "--prompt", "abc", "--stats", str(file), *LIMIT)
    content = file.read_bytes()
    assert content.startswith(magic)
    if ending == "svg":  # which keeps its texts: as comments beside their outlines
        for text in ("expert", "layer", "load (1 = even share)", "3 prompt and 6 new tokens"):
            assert text.encode() in content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x", "--stats", "load.txt"), r"--stats must end in \.png, .*; got load\.txt"),
        (("--prompt", "x", "--stats", "absent/load.png"), "there is no folder absent"),
        (("--prompt", "x", "--greedy", "--top-p", "0.5"), "--greedy .* cannot be combined with --top-p"),
        (
            ("--prompt", "x", "--temperature", "0", "--top-k", "3"),
            "--temperature 0 .* cannot be combined with --top-k$",
        ),
        (("--prompt", "x", "--greedy", "--temperature", "0"), "--greedy .* cannot be combined with --temperature"),
        (("--prompt", "x", "--temperature", "nan"), "temperature must be positive and finite, got nan"),
        (("--prompt", "x", "--temperature", "-1"), "temperature must be positive and finite, got -1.0"),
        (("--prompt", "x", "--system", "y"), "--system needs --chat"),
        (("--prompt", "x", "--chat-option", "thinking=true"), "--chat-option needs --chat"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x", "--prompt", ""), "prompt 2 of 2 is empty"),
        (("--prompt", "x", "--prompt", "\udce9", "--prompt", "y"), "prompt 2 of 3 is not valid UTF-8"),
        (("--prompt", "caf\udce9"), "the prompt is not valid UTF-8 after 'caf'"),  # how Python hands over other bytes
        (("--prompt", "x", "--chat", "--chat-option", "a=\udce9"), "--chat-option is not valid UTF-8"),
        (("--prompt", "x", "--chat", "--system", "\udce9"), "--system is not valid UTF-8 after ''"),
        (
            ("--prompt", "x", "--max-new-tokens", "1000000"),
            "the prompt takes 1 of the model's 100 positions, which leaves 99 for new tokens, not 1000000$",
        ),
        (
            ("--prompt", "x", "--prompt", "x" * 100),
            "prompt 2 of 2 has 100 tokens, which leaves no room for a new one in the model's 100 positions$",
        ),
    ],
)
def test_what_cannot_be_done_is_one_message_and_status_2(checkpoint, arguments, message, capsys):
    run(checkpoint, *arguments, status=2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top-p", "0"), "argument --top-p: must be above 0 and at most 1, which draws from all tokens; got 0.0"),
        (("--top-p", "1.5"), "argument --top-p: must be above 0 and at most 1, which draws from all tokens; got 1.5"),
        (("--top-p", "nan"), "argument --top-p: must be above 0 and at most 1, which draws from all tokens; got nan"),
        (("--temperature", "cold"), "argument --temperature: must be a number, got 'cold'"),
        (("--seed", "1.5"), "argument --seed: must be a whole number, got '1.5'"),
        (("--batch", "many"), "argument --batch: must be a whole number, got 'many'"),
    ],
    ids=" ".join,
)
def test_an_argument_that_is_no_legal_number_is_wrong_usage_in_plain_words(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "absent", "--prompt", "x", *arguments])
    assert f"{message}\n" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["99999999999999999999999", "-9223372036854775809"])
def test_a_seed_that_jax_does_not_take_is_wrong_usage(seed, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "absent", "--prompt", "x", "--seed", seed])
    assert ended.value.code == 2
    assert f"argument --seed: must be from -2^63 to 2^63 - 1, got {seed}" in capsys.readouterr().err


@pytest.mark.parametrize(("is_terminal", "message"), [(True, "give --prompt TEXT"), (False, "standard input is empty")])
def test_no_prompt_at_all_is_an_error(checkpoint, capsys, monkeypatch, is_terminal, message):
    give_stdin(monkeypatch, "", is_terminal=is_terminal)
    run(checkpoint, status=2)
    assert message in capsys.readouterr().err


def test_a_setting_that_is_not_supported_is_refused_before_the_model_is_loaded(checkpoint, capsys):
    (checkpoint.folder / "generation_config.json").write_text('{"num_beams": 4}')
    run(checkpoint, "--prompt", "x", status=2)
    assert "num_beams=4" in capsys.readouterr().err
    assert checkpoint.loaded_with == []


def test_a_generation_config_that_is_not_supported_can_be_left_aside(checkpoint, capsys):
    (checkpoint.folder / "generation_config.json").write_text('{"num_beams": 4, "max_new_tokens": 1}')
    run(checkpoint, "--prompt", "x", "--ignore-generation-config", *LIMIT)
    assert capsys.readouterr().out == f"x{checkpoint.text('x')}\n"


@pytest.mark.parametrize("file", [{"repetition_penalty": 1.7}, {}], ids=["checkpoint", "command line"])
def test_a_repetition_penalty_comes_from_the_checkpoint_or_the_command_line(checkpoint, capsys, file):
    (checkpoint.folder / "generation_config.json").write_text(json.dumps(file))
    options = ("--greedy",) if file else ("--greedy", "--repetition-penalty", "1.7")
    run(checkpoint, "--prompt", "ab", "--json", *options, *LIMIT)
    document = json.loads(capsys.readouterr().out)
    prompt_ids = checkpoint.tokenizer.encode("ab")
    assert document["settings"]["repetition_penalty"] == 1.7
    assert document["results"][0]["token_ids"] == expected_penalized(checkpoint.table, prompt_ids, NEW_TOKENS, 1.7)
    run(checkpoint, "--prompt", "ab", "--json", "--repetition-penalty", "1", *LIMIT)
    assert json.loads(capsys.readouterr().out)["results"][0]["token_ids"] == checkpoint.tokens("ab")


def test_a_file_in_place_of_a_checkpoint_is_refused(checkpoint, capsys):
    file = checkpoint.folder / "config.json"
    assert main(["generate", str(file), "--prompt", "x"]) == 2
    assert f"{file}: is not a folder" in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer_json_says_so(checkpoint, capsys):
    (checkpoint.folder / "tokenizer.json").rename(checkpoint.folder / "tokenizer.model")
    run(checkpoint, "--prompt", "x", status=2)
    assert "no tokenizer.json, only tokenizer.model" in capsys.readouterr().err


def test_a_golden_checkpoint_generates_in_a_process_of_its_own(tmp_path):
    """The whole way, with an output that cannot show every character."""
    (case, *_) = golden_cases("mixtral")
    expected = case.expected()
    folder = shutil.copytree(case.folder("fused"), tmp_path / "model")
    small_tokenizers.write(small_tokenizers.one_word_per_token(128), folder)
    prompt = " ".join(f"w{token}" for token in expected.prompts()[0])
    finished = subprocess.run(
        [sys.executable, "-m", "moe_jax.cli", "generate", folder, "--prompt", prompt, "--max-new-tokens", "32"]
        + ["--dtype", "float32", "--debug"],
        capture_output=True,
        text=True,
        check=False,
        env={"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"},
    )
    assert finished.returncode == 0, finished.stderr
    words = " ".join(f"w{token}" for token in expected.greedy_tokens[0])
    assert finished.stdout == f"{prompt} {words}\n"
    assert SPEED.fullmatch(finished.stderr)
