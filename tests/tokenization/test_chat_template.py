"""Chat templates: what they may use, what they are kept from, and how they fail."""

import datetime
import json

import pytest

from moe_jax.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "2 < 3 & 'so'?"}]


def test_lines_of_tags_leave_no_white_space():
    source = (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\nQ: {{ m.content }}\n    {% endif %}\n{% endfor %}\nA:"
    )
    assert ChatTemplate(source).render(MESSAGES) == "Q: 2 < 3 & 'so'?\nA:"


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("{{ value | tojson }}", {}),
        ("{{ value | tojson(indent=4) }}", {"indent": 4}),
        ("{{ value | tojson(separators=(',', ':')) }}", {"separators": (",", ":")}),
        ("{{ value | tojson(ensure_ascii=true, sort_keys=true) }}", {"ensure_ascii": True, "sort_keys": True}),
    ],
)
def test_tojson_is_plain_json_not_escaped_for_html(source, options):
    value = {"b": "<é> & 'quoted'", "a": [1, None, True]}
    expected = json.dumps(value, **{"ensure_ascii": False, **options})
    assert ChatTemplate(source).render([], value=value) == expected


def test_the_date_can_be_asked_for():
    today = datetime.datetime.now().strftime("%Y")
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) == today


def test_generation_blocks_and_loop_controls_are_understood():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert ChatTemplate(source).render([{"content": "one"}, {"content": "two"}]) == "one"


def test_tools_and_documents_are_none_and_other_names_undefined():
    source = "{{ tools is none }} {{ documents is none }} {{ enable_thinking is defined }} {{ add_generation_prompt }}"
    assert ChatTemplate(source).render([]) == "True True False False"
    assert ChatTemplate(source).render([], enable_thinking=True) == "True True True False"


def test_a_template_that_rejects_a_conversation_is_quoted():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template rejects this conversation: roles must alternate"):
        template.render(MESSAGES)


def test_a_template_that_is_not_jinja_is_refused_with_its_line():
    with pytest.raises(ValueError, match="the chat template is not valid, line 2"):
        ChatTemplate("fine\n{% if %}")


@pytest.mark.parametrize(
    ("source", "failure"),
    [
        ("{% for m in messages %}" * 25 + "{% endfor %}" * 25, "SyntaxError: too many statically nested blocks"),
        ("{% if messages %}" * 150 + "{% endif %}" * 150, "IndentationError: too many levels"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError: "),
        ("{{ " + "9" * 5000 + " }}", "ValueError: Exceeds the limit"),
    ],
    ids=["loops", "conditions", "brackets", "digits"],
)
def test_a_template_beyond_the_limits_of_python_is_refused(source, failure):
    with pytest.raises(ValueError, match=f"^the chat template cannot be compiled, {failure}"):
        ChatTemplate(source)


def test_an_operation_on_the_wrong_type_is_an_error_of_the_conversation():
    with pytest.raises(ValueError, match="the chat template rejects this conversation"):
        ChatTemplate("{{ messages[0].content + 'x' }}").render([{"role": "user", "content": None}])


@pytest.mark.parametrize(
    ("source", "failure"),
    [
        ("{{ 1 // (messages | length - 1) }}", "ZeroDivisionError: "),
        ("{{ 10.0 ** 400 }}", "OverflowError: "),
        ("{{ range(1000000000) | length }}", "OverflowError: "),
        ("{{ 'text'.index('z') }}", "ValueError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_template(source, failure):
    with pytest.raises(ValueError, match=f"^the chat template fails with {failure}"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(ValueError, match="the chat template rejects"):
        ChatTemplate(source).render(MESSAGES)
