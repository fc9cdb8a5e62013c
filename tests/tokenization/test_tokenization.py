"""Text to tokens and back."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_tokenizers
from support.small_tokenizers import CHATML, END_OF_TEXT

from moe_jax.tokenization import TextStream, Tokenizer

WORDS = ("the", "whale", "sea", "ship")
BYTE_LEVEL = Tokenizer(small_tokenizers.byte_level(extra_tokens=("<tag>",)))
SENTENCEPIECE = Tokenizer(small_tokenizers.sentencepiece_like(WORDS))
TEXTS = ["the whale", "  two spaces, and a tab\t", "Größe 你好 🐳🐳 naïve", "", "\n\nsea\n", "👩‍👩‍👧‍👦 family"]


def streamed(tokenizer, context, token_ids):
    """The pieces that a stream gives out."""
    stream = TextStream(tokenizer, context)
    return [stream.add(token) for token in token_ids] + [stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_decoding_inverts_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte level", "sentencepiece"])
def test_streamed_pieces_add_up_to_the_text_and_never_break_a_character(tokenizer, text):
    pieces = streamed(tokenizer, [], tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(deadline=None)
@given(st.text(max_size=12), st.text(max_size=30))
def test_a_stream_adds_to_its_prompt_what_the_tokens_add(prompt, text):
    prompt_ids, ids = BYTE_LEVEL.encode(prompt), BYTE_LEVEL.encode(text)
    assert BYTE_LEVEL.continuation(prompt_ids, ids) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 257), max_size=40))
def test_any_bytes_stream_to_what_they_decode_to_as_a_whole(token_ids):
    whole = BYTE_LEVEL.decode(token_ids)
    assert "".join(streamed(BYTE_LEVEL, [], token_ids)) == whole


def test_the_space_between_prompt_and_continuation_is_kept():
    prompt = SENTENCEPIECE.encode("the")
    continuation = SENTENCEPIECE.encode("whale sea", add_special_tokens=False)
    assert SENTENCEPIECE.decode(continuation) == "whale sea"
    assert SENTENCEPIECE.continuation(prompt, continuation) == " whale sea"
    assert streamed(SENTENCEPIECE, prompt, continuation) == [" whale", " sea", ""]


def test_a_token_without_text_does_not_take_the_space_of_the_next_one():
    start = SENTENCEPIECE.backend.token_to_id("<s>")
    whale = SENTENCEPIECE.encode("whale", add_special_tokens=False)
    assert streamed(SENTENCEPIECE, SENTENCEPIECE.encode("the"), [start, *whale]) == ["", " whale", ""]


def test_a_stream_decodes_few_tokens_again_however_long_it_is(monkeypatch):
    ids, decoded = BYTE_LEVEL.encode("the whale " * 50), []
    monkeypatch.setattr(BYTE_LEVEL, "decode", lambda ids: decoded.append(len(ids)) or BYTE_LEVEL.backend.decode(ids))
    assert "".join(streamed(BYTE_LEVEL, [], ids)) == "the whale " * 50
    assert max(decoded) == 2


def test_a_character_is_given_out_with_its_last_byte_only():
    ids = BYTE_LEVEL.encode("a你b")
    assert streamed(BYTE_LEVEL, [], ids) == ["a", "", "", "你", "b", ""]


def test_an_unfinished_character_is_given_out_at_the_end():
    ids = BYTE_LEVEL.encode("a你")[:-1]
    assert streamed(BYTE_LEVEL, [], ids) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_encoded_around_text_and_left_out_of_decoded_text():
    ids = SENTENCEPIECE.encode("the sea")
    assert ids[0] == SENTENCEPIECE.backend.token_to_id("<s>")
    assert SENTENCEPIECE.encode("the sea", add_special_tokens=False) == ids[1:]
    assert SENTENCEPIECE.decode(ids) == "the sea"
    assert SENTENCEPIECE.decode(ids, skip_special_tokens=False).startswith("<s>")


def test_a_chat_template_writes_all_special_tokens_itself():
    tokenizer = Tokenizer(
        small_tokenizers.sentencepiece_like(WORDS),
        special_tokens={"bos_token": "<s>"},
        chat_template="{{ bos_token }}{{ messages[0].content }}",
    )
    ids = tokenizer.encode_chat([{"role": "user", "content": "the sea"}])
    assert ids.count(tokenizer.backend.token_to_id("<s>")) == 1
    assert tokenizer.decode(ids).strip() == "the sea"


def test_a_stored_truncation_or_padding_does_not_shorten_or_lengthen_prompts(tmp_path):
    backend = small_tokenizers.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(small_tokenizers.write(backend, tmp_path))
    assert len(tokenizer.encode("0123456789")) == 10
    assert len(tokenizer.encode("01")) == 2


@pytest.mark.parametrize("eos_token", [END_OF_TEXT, {"content": END_OF_TEXT, "lstrip": False}])
def test_a_folder_gives_tokenizer_special_tokens_and_chat_template(tmp_path, eos_token):
    folder = small_tokenizers.write(small_tokenizers.byte_level(), tmp_path, eos_token=eos_token, chat_template=CHATML)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "other", "bos_token": "<s>"}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"eos_token": END_OF_TEXT, "bos_token": "<s>"}
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    expected = f"<|user|>hi{END_OF_TEXT}\n<|assistant|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected
    assert tokenizer.backend.token_to_id(END_OF_TEXT) in ids


def test_a_template_file_goes_before_the_one_in_the_config(tmp_path):
    folder = small_tokenizers.write(small_tokenizers.byte_level(), tmp_path, chat_template="config")
    (folder / "chat_template.jinja").write_text("file")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode_chat([])) == "file"


def test_a_template_file_that_is_not_text_is_named(tmp_path):
    folder = small_tokenizers.write(small_tokenizers.byte_level(), tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.from_folder(folder)


def test_of_several_named_templates_the_default_is_used(tmp_path):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer.from_folder(
        small_tokenizers.write(small_tokenizers.byte_level(), tmp_path, chat_template=templates)
    )
    assert tokenizer.decode(tokenizer.encode_chat([])) == "plain"
    small_tokenizers.write(small_tokenizers.byte_level(), tmp_path, chat_template=templates[:1])
    with pytest.raises(ValueError, match="chat templates tool_use, but none called 'default'"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "chat_template",
    [[{"name": "default"}], [{"template": "x"}], [{"name": "default", "template": 1}], ["x"], {"default": "x"}, 5],
    ids=str,
)
def test_a_chat_template_that_is_neither_a_text_nor_named_texts_is_refused_with_its_file(tmp_path, chat_template):
    small_tokenizers.write(small_tokenizers.byte_level(), tmp_path, chat_template=chat_template)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be a text or a list of objects"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("eos_token", [{"lstrip": False}, {"content": 5}, 5, ["</s>"]], ids=str)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_special_token_that_is_no_text_is_refused_with_its_file(tmp_path, file, eos_token):
    folder = small_tokenizers.write(small_tokenizers.byte_level(), tmp_path)
    (folder / file).write_text(json.dumps({"eos_token": eos_token}))
    with pytest.raises(ValueError, match=rf"{file}: eos_token must be a text or an object with \"content\", got "):
        Tokenizer.from_folder(folder)


def test_a_checkpoint_without_chat_template_says_so(tmp_path):
    tokenizer = Tokenizer.from_folder(small_tokenizers.write(small_tokenizers.byte_level(), tmp_path))
    with pytest.raises(ValueError, match=r"no chat template: neither chat_template\.jinja"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_tokenizer_json_says_what_is_there_instead(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json$"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(FileNotFoundError, match=r"only tokenizer\.model, which is not read.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Tokenizer.from_folder(tmp_path / "absent")


def test_a_broken_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_the_backend_is_an_ordinary_tokenizer():
    assert isinstance(BYTE_LEVEL.backend, tokenizers.Tokenizer)
