"""Chat templates: the Jinja sources with which checkpoints turn a conversation into a prompt.

They come with the checkpoint and are run in a sandbox; what they may use is what Hugging Face's `apply_chat_template`
offers.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant said, for training; the text is unchanged."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str):
        """Compile `source`; ValueError naming the fault, and the line where it is known, if it is not valid Jinja."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
            loader=jinja2.DictLoader({}),  # there is nothing to include
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid, line {error.lineno}: {error.message}") from error
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            # Jinja makes Python of it, which has limits of its own, such as how deeply blocks are nested.
            raise ValueError(f"the chat template cannot be compiled, {type(error).__name__}: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation; ValueError with the template's own words if it rejects the conversation or fails.

        Args:
            messages: each with "role" and "content", as the template expects them.
            add_generation_prompt: end with what introduces the assistant's next message.
            **variables: special tokens and whatever else the template reads.
        """
        # Templates test `tools` and `documents` for none, so they must exist.
        variables = {"tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: such as text + none
            raise ValueError(f"the chat template rejects this conversation: {error}") from error
        except Exception as error:  # a template is the checkpoint's own program, which can fail in any way
            raise ValueError(f"the chat template fails with {type(error).__name__}: {error}") from error
