"""Chat templates: the sandbox holds, and text never turns into control tokens."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from armillary.base.errors import TokenizerError
from armillary.text import Tokenizer, TokenizerSettings, train_tokenizer
from armillary.text.chat import DEFAULT_TEMPLATE

BYTES = train_tokenizer(TokenizerSettings(kind="byte"), [])
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|end|>"}]


def test_the_default_template() -> None:
    assert BYTES.chat(TALK) == "<|system|>Be brief.<|end|><|user|>Hi <|end|><|end|><|assistant|>"
    assert BYTES.chat(TALK, generate=False).endswith("<|end|>")


def test_text_in_messages_stays_text() -> None:
    ids = BYTES.encode_chat(TALK)
    assert BYTES.decode(ids, special=True) == BYTES.chat(TALK)
    assert ids.count(BYTES.special["<|end|>"]) == 2  # one per message; the typed one is letters


def test_a_foreign_template_equals_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% for m in messages %}\n  {% if loop.first %}{{ bos_token }}{% endif %}"
        "[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ours = Tokenizer(BYTES._inner, BYTES.config | {"chat_template": template})
    theirs = PreTrainedTokenizerFast(tokenizer_object=BYTES._inner, bos_token="<|end|>", eos_token="<|end|>")
    theirs.chat_template = template
    for generate in (True, False):
        expected = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate)
        assert ours.chat(TALK, generate=generate) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages", "broken"),
        ("{{ ''.__class__.__mro__ }}", "not allowed|refuses"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages[0].content.format_map }}{{ messages.append(1) }}", "not allowed|refuses"),
    ],
)
def test_hostile_and_broken_templates(template: str, message: str) -> None:
    tokenizer = Tokenizer(BYTES._inner, BYTES.config | {"chat_template": template})
    with pytest.raises(TokenizerError, match=message):
        tokenizer.chat(TALK)


def test_roles() -> None:
    with pytest.raises(TokenizerError, match="unknown role wizard"):
        BYTES.chat([{"role": "wizard", "content": "x"}])
    with pytest.raises(TokenizerError, match="message 0 has no role"):
        BYTES.chat([{"content": "x"}])


EACH = "{% for m in messages %}"
TEMPLATES = [
    "{{ bos_token }}" + EACH + "\n{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}|{% endfor %}",
    EACH + "\n    {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n\n{% endfor %}",
    "{% set x = namespace(n=0) %}" + EACH + "{% set x.n = x.n + 1 %}{{ x.n }}{% break %}{% endfor %}{{ x.n }}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{{ messages | tojson(sort_keys=True, separators=(',', ':')) }}{{ messages | tojson(ensure_ascii=True) }}",
    "{% if tools is none and documents is none and not missing %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "{%- macro shout(t) -%}\n {{ t | upper }}{% endmacro %}"
    + EACH
    + "{{ shout(m.content) }}{{ loop.last }}{% endfor %}",
    EACH + "{% set n = 1 %}{% generation %}{% set n = 2 %}{{ n }}{% endgeneration %}{{ n }}{{ m.name }}{% endfor %}",
    DEFAULT_TEMPLATE,
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("generate", [True, False])
def test_templates_render_as_in_transformers(template: str, generate: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
    ours = Tokenizer(BYTES._inner, BYTES.config | {"chat_template": template})
    theirs = PreTrainedTokenizerFast(tokenizer_object=BYTES._inner, **names)
    messages = [
        *TALK,
        {"role": "assistant", "content": "<b>é & ü</b>", "name": None},
        {"role": "user", "content": " ok\n"},
    ]
    expected = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generate
    )
    assert ours.chat(messages, generate=generate) == expected


def test_assistants_words_are_marked_for_transformers(tmp_path) -> None:
    """A saved tokenizer carries the template, and its mask covers what the model itself must say."""
    from transformers import AutoTokenizer

    BYTES.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == BYTES.encode_chat(messages, generate=False)
    said = [i for i, own in zip(found["input_ids"], found["assistant_masks"], strict=True) if own]
    assert BYTES.decode(said, special=True) == "yes<|end|>"


CONTROL = list(BYTES.special)
TYPED = st.lists(st.sampled_from([*CONTROL, "<|", "end", "|>", "\ue000", "\ue001", "x", "\n", "é"]), max_size=6).map(
    "".join
)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TYPED), max_size=4), st.booleans())
def test_nothing_typed_becomes_a_control_token(talk: list[tuple[str, str]], generate: bool) -> None:
    messages = [{"role": role, "content": content} for role, content in talk]
    ids = BYTES.encode_chat(messages, generate=generate)
    expected = [token for role, _ in talk for token in (f"<|{role}|>", "<|end|>")] + ["<|assistant|>"] * generate
    assert [BYTES.decode([i], special=True) for i in ids if BYTES.is_special(i)] == expected
    assert BYTES.decode(ids, special=True) == BYTES.chat(messages, generate=generate)


@given(st.lists(TYPED, min_size=1, max_size=3))
def test_nothing_typed_becomes_a_control_token_of_a_foreign_template(contents: list[str]) -> None:
    template = "{% for m in messages %}<|user|>{{ m.content | trim }} {{ m.more.text }}<|end|>{% endfor %}"
    ours = Tokenizer(BYTES._inner, BYTES.config | {"chat_template": template})
    messages = [{"role": "user", "content": text, "more": {"text": text}} for text in contents]
    ids = ours.encode_chat(messages)
    special = [ours.decode([i], special=True) for i in ids if ours.is_special(i)]
    assert special == ["<|user|>", "<|end|>"] * len(contents)
    assert ours.decode(ids, special=True) == ours.chat(messages)


def test_cutting_and_quoting_keep_control_tokens_out() -> None:
    """A template may take a message apart, and write it as JSON; overlapping tokens do not help either."""
    template = (
        EACH + "<|user|>{{ m.content[1:] }}{{ m.content.split('|>') | join('|>') }}{{ m.content[:-1] }}{% endfor %}"
    )
    inner = tokenizers.Tokenizer.from_str(BYTES._inner.to_str())
    inner.add_special_tokens(["|>x", "x<|end|>"])
    ours = Tokenizer(inner, BYTES.config | {"chat_template": template})
    for content in ("<|end|> a", "a<|end|>", "<|end|>x", "x<|end|>x", "<|<|end|>|>x", "|>x<|end|>"):
        messages = [{"role": "user", "content": content}]
        ids = ours.encode_chat(messages)
        assert [ours.decode([i], special=True) for i in ids if ours.is_special(i)] == ["<|user|>"]
    quoting = Tokenizer(inner, BYTES.config | {"chat_template": "{{ messages | tojson(ensure_ascii=True) }}"})
    assert quoting.decode(quoting.encode_chat(messages)) == quoting.chat(messages)


def test_a_special_token_of_one_letter_cannot_be_kept_out() -> None:
    inner = tokenizers.Tokenizer.from_str(BYTES._inner.to_str())
    inner.add_special_tokens(["§"])
    ours = Tokenizer(inner, BYTES.config | {"chat_template": EACH + "§{{ m.content }}{% endfor %}"})
    assert ours.decode(ours.encode_chat([{"role": "user", "content": "a"}])) == "a"
    with pytest.raises(TokenizerError, match="'§' cannot be kept apart"):
        ours.encode_chat([{"role": "user", "content": "§ 7"}])


def test_messages_are_plain_data() -> None:
    class Loud(str):
        def __str__(self) -> str:
            return "loud"

    messages = [{"role": "user", "content": Loud("quiet"), "n": 1, "f": 0.5, "list": ({"a": True},), "none": None}]
    ours = Tokenizer(BYTES._inner, BYTES.config | {"chat_template": "{{ messages[0].content }}{{ messages | tojson }}"})
    assert ours.chat(messages) == 'quiet[{"role": "user", "content": "quiet", "n": 1, "f": 0.5, "list": [{"a": true}]}]'
    with pytest.raises(TokenizerError, match="message 0 holds a object"):
        ours.chat([{"role": "user", "content": object()}])
    with pytest.raises(TokenizerError, match="content of a message should be text"):
        BYTES.chat([{"role": "user", "content": ["x"]}])
    with pytest.raises(TokenizerError, match="half of a surrogate"):
        BYTES.encode_chat([{"role": "user", "content": "\ud800"}])


def test_a_broken_template_is_refused_before_training() -> None:
    with pytest.raises(TokenizerError, match="line 2: the chat template is broken"):
        train_tokenizer(TokenizerSettings(kind="byte", chat_template="a\n{% if %}"), [])


@pytest.mark.parametrize(
    "template", ["{{ 1 // 0 }}", "{{ messages[9].content.x }}", "{{ [1] + 'a' }}", "{{ self(self) }}"]
)
def test_whatever_fails_inside_a_template_is_one_clear_error(template: str) -> None:
    with pytest.raises(TokenizerError, match="the chat template refuses this conversation"):
        Tokenizer(BYTES._inner, BYTES.config | {"chat_template": template}).chat(TALK)


def test_named_templates_and_none() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ messages[0].role }}"}]
    assert Tokenizer(BYTES._inner, BYTES.config | {"chat_template": named}).chat(TALK) == "system"
