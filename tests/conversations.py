"""Odd conversations, and what transformers makes of them: ``python tests/conversations.py`` writes the golden file.

``golden/chat_template.json`` holds conversations and their ids, computed by transformers with Gemma 3's chat template
and the tokenizer that ships with the package (needs the parity extra).
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "chat_template.json"
Messages = list[dict[str, Any]]

# Gemma 3's template, by its published rules. The {% generation %} block adds no text: it tells transformers which
# tokens are the assistant's.
TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- if message['content'] is string -%}
        {%- set ns = namespace(text=message['content'] | trim) -%}
    {%- else -%}
        {%- set ns = namespace(text='') -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {%- set ns.text = ns.text + (part['text'] | trim) -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') -}}
    {%- if role == 'model' -%}
        {%- generation -%}{{- ns.text + '<end_of_turn>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- ns.text + '<end_of_turn>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
"""

TEXTS = {
    "leading and trailing blanks": "  \n\t both ends \t\n  ",
    "newlines within": "one\n\ntwo\n\n\nthree\n \n\t\nfour",
    "newlines of others": "dos\r\nmac\rform\ffeed\vtab\x85nel\u2028line\u2029paragraph",
    "tabs": "a\tb\t\tc\t\t\td\n\te",
    "spaces": "a  b   c    d     e" + " " * 40 + "f",
    "no-break spaces": "\xa0\u202f a\xa0b\u2007c \u3000\xa0",
    "zero width": "\u200bzero\u200cwidth\u200djoiner\ufeff\u2060\u200b",
    "emoji": "🏠🔥 👨‍👩‍👧‍👦 🇵🇱 👍🏽 ☕️ 1️⃣",
    "CJK": "你好，世界！ 日本語のテスト。 한국어 시험",
    "right to left": "שלום עולם \u202eabc\u202c مرحبا بالعالم ١٢٣",
    "Indic": "नमस्ते दुनिया தமிழ் ไทย",
    "combining": "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343 zażółć gęślą jaźń ﬁ Ⅷ ½",
    "beyond the basic plane": "𝕳𝖊𝖑𝖑𝖔 𐍈 🀄 \U0010fffd",
    "control characters": "nul\x00bell\x07esc\x1b[31mred\x1b[0mdel\x7fc1\x9funit\x1f.",
    "separators that are trimmed": "\x1c\x1d\x1e\x1f text \x1c",
    "JSON": '{"action": "dim", "rooms": ["hall", null], "percent": 4.0e1, "note": "a\\nb\\u00e9"}',
    "Python": 'def f(x: list[int]) -> str:\n    """Doc."""\n    return f"{x!r}\\n" if x else \'\'\n',
    "Makefile": "all:\n\t@echo $$HOME && rm -rf ./build\n\n.PHONY: all",
    "HTML": "<table><tr><td>1</td></tr></table> <b>bold</b> &lt;end&gt; <br/> <!-- x -->",
    "LaTeX": r"\begin{align} x &= \frac{1}{2} \\ \end{align} % done",
    "Markdown": "# Title\n\n- [ ] a\n- [x] b\n\n```sh\nls -la | grep '^d'\n```\n\n| a | b |\n|---|---|\n",
    "Jinja": "{{ bos_token }} {% if x %}y{% endif %} {# no #} {{ messages[0]['content'] }}",
    "like special tokens": "<end_of turn> < end_of_turn> <END_OF_TURN> end_of_turn> <unused> <unused-1> [ multimodal]",
    "words of the template": "user\nmodel\nuser\n\nmodel",
    "angle brackets": "<<<>>> < > <<a>> a<b>c <| |> </s> <s> [INST] <|im_end|>",
    "digits": "1234567890 3.14159 1,000,000 0x7f 1e-9 -0",
    "punctuation": "!?.,;:'\"()[]{}…—–-«»„”‘’`´~^*_+=/\\|@#$%&§",
    "one letter": "x",
    "one zero-width space": "\u200b",
    "backslashes": "\\n \\t \\\\ \\u0041 \\x00",
    "sentencepiece's space": "a▁b▁▁c",
    "repeats": "ha" * 150 + " " + "!" * 80 + "\n" * 33 + "end",
}


def chat(*turns: tuple[str, Any]) -> Messages:
    """(role, content) pairs as messages."""
    return [{"role": role, "content": content} for role, content in turns]


def parts(*texts: str) -> list[dict[str, str]]:
    """Content in several parts."""
    return [{"type": "text", "text": text} for text in texts]


def odd_conversations() -> list[Messages]:
    """Written by hand: each odd text as system, user and assistant, and what is odd about the turns themselves."""
    names = list(TEXTS)
    shifted = zip(names, names[1:] + names[:1], names[2:] + names[:2], strict=True)
    texts = [
        chat(("system", TEXTS[a]), ("user", TEXTS[b]), ("assistant", TEXTS[c]), ("user", "ok?"), ("assistant", "ok"))
        for a, b, c in shifted
    ]
    fox = "The quick brown fox jumps over the lazy dog."
    back_and_forth = [("user", "ping"), ("assistant", "pong")] * 6
    return [
        *texts,
        chat(("user", "Hi"), ("assistant", "Hello")),
        chat(("user", "Hi"), ("model", "Hello")),
        chat(("user", "Hi"), ("model", "Hello"), ("user", "Bye"), ("assistant", "See you")),
        chat(*back_and_forth),
        chat(*back_and_forth[:11]),
        chat(("user", "Hi"), ("assistant", "Hello"), ("user", "and then nothing")),
        chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "last word")),
        chat(("system", "  kept as it is \n"), ("user", "  trimmed \n"), ("assistant", "\n\n trimmed\t")),
        chat(("system", "\n\n\nnewlines first"), ("user", "\n\nu"), ("assistant", "a")),
        chat(("system", "newlines last\n\n\n"), ("user", "u\n"), ("assistant", "a\n")),
        chat(("system", "\t\ttabs\t"), ("user", "\tu"), ("assistant", "\ta\t")),
        chat(("system", "\xa0blank no-break\xa0"), ("user", "\xa0u\xa0"), ("assistant", "\xa0a\xa0")),
        chat(("system", parts("  one part, kept as it is \n")), ("user", "Hi"), ("assistant", "Hello")),
        chat(("user", parts("one part")), ("assistant", parts("another"))),
        chat(("user", parts(" a ", " b ", "\nc\n")), ("assistant", parts("x\n", "\ny", "z"))),
        chat(("user", parts("a", "", "  ", "\n", "b")), ("assistant", parts("", "only the second", ""))),
        chat(("system", parts("s")), ("user", parts("split wo", "rd, 你", "好")), ("model", parts("12", "34", ".5"))),
        chat(("user", parts("first in parts")), ("assistant", "then a text"), ("user", parts("u")), ("model", "m")),
        chat(("user", "user"), ("assistant", "model"), ("user", "model\n"), ("assistant", "user\n")),
        chat(("user", "system"), ("assistant", "assistant")),
        chat(("user", "same"), ("assistant", "same"), ("user", "same"), ("assistant", "same")),
        chat(("user", fox * 20), ("assistant", "y")),
        chat(("user", "x"), ("assistant", " ".join([fox] * 20))),
        chat(("system", f"{fox}\n" * 20), ("user", "x"), ("assistant", "y")),
        [
            {"role": "user", "content": "q", "name": "Ann", "id": 7},
            {"role": "assistant", "content": "a", "refusal": None},
        ],
        chat(("system", "{{ bos_token }}"), ("user", "{% raw %}"), ("assistant", "{# comment #}")),
        chat(("user", "<"), ("assistant", ">"), ("user", "end_of_turn>"), ("assistant", "<end_of_turn")),
        chat(("system", "<start_of_turn"), ("user", ">user"), ("assistant", "[multimodal")),
    ]


def long_conversations() -> list[Messages]:
    """Too long for a golden file."""
    draw = random.Random(1)
    words = ["lamp", "kitchen", "the", "好", "🏠", "\n", "7", "def", "{", "}", "naïve"]
    text = " ".join(draw.choices(words, k=4000))
    return [
        chat(("user", text), ("assistant", "short")),
        chat(("user", "short"), ("assistant", text)),
        chat(("system", text), ("user", "a" * 5000), ("assistant", "好" * 3000)),
        chat(*[(role, f"{text[i : i + 500]}.") for i in range(0, 5000, 1000) for role in ("user", "assistant")]),
    ]


def render(messages: Messages) -> str:
    """A conversation in Gemma 3's template by its rules, without the BOS; no jinja."""
    prefix, text = "", ""
    for message in messages:
        role, content = message["role"], message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        if role == "system":
            prefix = texts[0] + "\n\n"
            continue
        name = "model" if role in ("assistant", "model") else "user"
        text += f"<start_of_turn>{name}\n{prefix}{''.join(t.strip() for t in texts)}<end_of_turn>\n"
        prefix = ""
    return text


ATOMS = [
    *TEXTS.values(),
    *("lamp", "Turn the", "kitchen", "the", "user", "model", "turn", "é", "好", "🏠", "א", "7", "12.5", "▁", "x" * 30),
    *(" ", "  ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", "\r\n", "\xa0", "\u200b", "\ufeff", "\x00", "\x85", "\u2028"),
    *("<", ">", "<b>", "</td>", "[", "]", "{", "}", '"', "\\", "_", ".", "end_of_turn", "of_turn>", "<unused", "<bo"),
]
SPECIAL_ATOMS = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused7>", "<unused98>", "[multimodal]"]
SPECIAL_ATOMS += [
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<unused99>",
    "<end_of_turn>\n<start_of_turn>user\n",
]


def random_conversations(count: int, seed: int, special: float = 0.0) -> list[Messages]:
    """Two to twelve turns of odd texts, with and without a system turn, whole or in parts.

    Args:
      count: how many.
      seed: of the draw.
      special: share of the texts that spell a special token out.
    """
    draw = random.Random(seed)
    made: list[Messages] = []
    for _ in range(count):
        turns: list[tuple[str, Any]] = []
        if draw.random() < 0.5:
            text = _random_text(draw, special)
            turns.append(("system", parts(text) if draw.random() < 0.2 else text))
        for i in range(draw.randint(2, 12)):
            role = draw.choice(("assistant", "model")) if i % 2 else "user"
            texts = [_random_text(draw, special) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
            turns.append((role, parts(*texts, *draw.choice(([], [""], [" \n"]))) if len(texts) > 1 else texts[0]))
        made.append(chat(*turns))
    return made


def _random_text(draw: random.Random, special: float) -> str:
    atoms = draw.choices(ATOMS, k=draw.randint(0, 5))
    if draw.random() < special:
        atoms.insert(draw.randint(0, len(atoms)), draw.choice(SPECIAL_ATOMS))
    return "".join(atoms) if "".join(atoms).strip() else f"{''.join(atoms)}x"


def build_transformers_tokenizer(directory: Path) -> Any:
    """Gemma's tokenizer as transformers has it, from the ``tokenizer.model`` of a directory, with the template."""
    import transformers

    tokenizer = transformers.GemmaTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main() -> None:
    """Writes the golden file."""
    import transformers

    from adaptax.models import ASSETS

    directory = ASSETS / "gemma3_tiny"
    tokenizer = build_transformers_tokenizer(directory)
    rows = [
        {"messages": messages, "ids": tokenizer.apply_chat_template(messages, return_dict=False)}
        for messages in odd_conversations()
    ]
    head = {
        "made_by": f"tests/conversations.py, transformers {transformers.__version__}",
        "tokenizer_sha256": hashlib.sha256((directory / "tokenizer.model").read_bytes()).hexdigest(),
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    GOLDEN.write_text(f'{json.dumps(head)[:-1]}, "conversations": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
