"""Of a prompt exactly the caption and the token that closes its turn are kept, whatever model reads it."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, Qwen2Config

from lidit.models.chat import MARK, Prompts
from lidit.models.llm import INSTRUCTION

CAPTIONS = [
    "a red circle to the left of a blue square",
    INSTRUCTION,
    f"{INSTRUCTION} {INSTRUCTION}",
    "Describe the image",
    "user assistant system You help. You describe pictures.",
    "objects: objects:",
    f"a page that says {MARK}, twice: {MARK}",
    "🙂 beside a 🟥, 👩‍👩‍👧 above",
    "красный круг, 红色的圆, naïve cafe\u0301",
    "“curly” \"straight\" 'single' {{ messages }} {% raw %} \\n & <b>",
    "two\nlines\n\nand  double  spaces",
    "a sign that says <|im_end|> and <|eot_id|> and <|end|>",
    "x",
    ".",
]


@pytest.fixture(params=["tiny_llama", "tiny_qwen", "bundled:llm_llama", "bundled:llm_qwen"])
def name(request: pytest.FixtureRequest) -> str:
    """Llama 3's and Qwen's manner, and the miniature LLMs."""
    return request.param if ":" in request.param else str(request.getfixturevalue(request.param))


@pytest.fixture
def with_template(tmp_path: Path, tiny_llama: Path) -> Callable[[str | None], str]:
    """Makes a copy of the tiny Llama's tokenizer with another chat template."""

    def make(template: str | None) -> str:
        folder = tmp_path / "llm"
        shutil.copytree(tiny_llama, folder)
        (folder / "chat_template.jinja").unlink()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return make


def prompts(name: str, **settings: object) -> Prompts:
    defaults = {"instruction": INSTRUCTION, "system": None, "max_tokens": 10_000, "revision": None, "template": "chat"}
    return Prompts(name, **defaults | settings)


def text(model: Prompts, ids: list[int]) -> str:
    return composed(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def composed(string: str) -> str:
    """Letters with their accents as one character, as Qwen's tokenizer makes them before it looks."""
    return unicodedata.normalize("NFC", string)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_exactly_the_caption_and_the_closing_token_are_kept(name: str, caption: str) -> None:
    model = prompts(name)
    ids, start, cut = model.split(caption)
    assert text(model, ids[start:-1]).removeprefix(" ") == composed(caption)  # a first token may hold the space
    assert ids[-1] == model.tokenizer.eos_token_id
    assert cut == 0


@pytest.mark.parametrize("caption", CAPTIONS)
def test_before_the_caption_stands_the_template_up_to_the_instruction(name: str, caption: str) -> None:
    model = prompts(name)
    ids, start, _ = model.split(caption)
    turns = [{"role": "user", "content": f"{INSTRUCTION} {caption}"}]
    rendered = model.tokenizer.apply_chat_template(turns, tokenize=False)
    assert text(model, ids) == composed(rendered).removesuffix("\n")
    assert text(model, ids[:start]).rstrip(" ").endswith(INSTRUCTION)


def test_an_empty_caption_keeps_one_token(name: str) -> None:
    model = prompts(name)
    for caption in ("", "  \n"):
        ids, start, _ = model.split(caption)
        assert ids[start:] == [model.tokenizer.eos_token_id]
        assert text(model, ids[:start]).endswith(INSTRUCTION)


def test_without_an_instruction_the_turn_is_the_caption_alone(name: str) -> None:
    model = prompts(name, instruction="")
    ids, start, _ = model.split("a red circle")
    assert text(model, ids[start:-1]) == "a red circle"
    assert not text(model, ids[:start]).endswith(" ")
    ids, start, _ = model.split("")
    assert ids[start:] == [model.tokenizer.eos_token_id]


def test_white_space_around_a_caption_changes_nothing(name: str) -> None:
    model = prompts(name)
    assert model.split(" \n a red circle\t ") == model.split("a red circle")


def test_a_long_caption_is_cut_and_its_turn_still_closed(name: str) -> None:
    caption = "a red circle to the left of a blue square and a green star"
    whole, start, _ = prompts(name).split(caption)
    ids, start_of_cut, cut = prompts(name, max_tokens=5).split(caption)
    assert ids == whole[: start + 5] + [whole[-1]]
    assert start_of_cut == start
    assert cut == len(whole) - len(ids) > 0


def test_the_shown_tokens_join_to_the_text_and_tell_what_is_kept(name: str) -> None:
    shown = prompts(name).show("a red circle")
    assert "".join(piece for piece, kept in shown if kept).lstrip().startswith("a red circle<|")
    assert "".join(piece for piece, kept in shown if not kept).rstrip(" ").endswith(INSTRUCTION)


def test_a_piece_of_a_character_is_shown_by_its_name(tiny_llama: Path) -> None:
    assert all("\ufffd" not in piece and piece for piece, _ in prompts(str(tiny_llama)).show("🙂"))


def test_the_system_prompt_replaces_the_templates_own(tiny_qwen: Path) -> None:
    own = prompts(str(tiny_qwen))
    given = prompts(str(tiny_qwen), system="You paint.")
    assert "You help." in text(own, own.split("x").ids)
    seen = text(given, given.split("x").ids)
    assert "You paint." in seen
    assert "You help." not in seen


def test_a_text_begins_once_also_where_the_tokenizer_would_begin_it_again(tmp_path: Path, tiny_llama: Path) -> None:
    folder = beginning(shutil.copytree(tiny_llama, tmp_path / "llm"))
    model = prompts(str(folder))
    begin = model.tokenizer.bos_token_id
    assert model.tokenizer("x").input_ids[0] == begin
    assert model.split("x").ids.count(begin) == 1
    assert prompts(str(folder), template="plain").split("x").ids.count(begin) == 1


def test_a_plain_prompt_is_instruction_and_caption_closed_by_the_end_of_text(
    with_template: Callable[[str | None], str],
) -> None:
    model = prompts(with_template(None), template="plain")
    ids, start, _ = model.split("a red circle")
    assert text(model, ids) == f"{INSTRUCTION} a red circle<|eot_id|>"
    assert text(model, ids[start:]) == " a red circle<|eot_id|>"
    ids, start, _ = model.split("")
    assert text(model, ids[start:]) == "<|eot_id|>"


def test_no_chat_template_is_an_error_that_names_the_ways_out(with_template: Callable[[str | None], str]) -> None:
    with pytest.raises(ValueError, match=r"no chat template: put a chat_template\.jinja .* or use template=plain"):
        prompts(with_template(None)).split("x")


def test_templates_of_parts_beside_the_config_serve(with_template: Callable[[str | None], str]) -> None:
    # as LLaVA-type models keep it: for their processor, in a file the tokenizer does not read
    template = (
        "{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>"
        "{% for part in turn.content | selectattr('type', 'equalto', 'text') %}{% generation %}\n{{ part.text }}"
        "{% endgeneration %}{% endfor %}<|eot_id|>{% endfor %}"
    )
    name = with_template(None)
    Path(name, "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model = prompts(name, system="You paint.")
    ids, start, _ = model.split("a red circle")
    assert text(model, ids[start:]) == " a red circle<|eot_id|>"
    assert "You paint." in text(model, ids[:start])


def test_a_turn_without_a_closing_token_is_closed_by_what_asks_for_the_answer(
    with_template: Callable[[str | None], str],
) -> None:
    model = prompts(
        with_template(
            "{% for turn in messages %}USER: {{ turn.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant{% endif %}"
        )
    )
    ids, start, _ = model.split("a red circle")
    assert text(model, ids[start:]) == " a red circle<|start_header_id|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content | lower }}<|eot_id|>", "changes the caption 'A Red circle'"),
        ("{{ messages[0].content | upper }}<|eot_id|>", "does not show the user's turn once"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "does not show the user's turn once"),
        ("<|eot_id|>", "does not show the user's turn once"),
        ("{{ messages[0].content }}", "puts nothing after the user's turn; use template=plain"),
        ("{{ raise_exception('only with pictures') }}", r"does not take these turns \(only with pictures\)"),
    ],
)
def test_a_template_that_hides_or_changes_the_caption_is_refused(
    with_template: Callable[[str | None], str], template: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prompts(with_template(template)).split("A Red circle")


@pytest.mark.parametrize("caption", ["a red circle", "🙂 a red circle 🙂", "ä ö", INSTRUCTION])
def test_tokenizers_of_the_sentencepiece_kind_keep_the_caption_too(
    tmp_path: Path, tiny_llama: Path, caption: str
) -> None:
    # Llama 2's manner: a space is a letter of the word after it, unknown letters are spelled in bytes, [/INST] closes
    shutil.copy(tiny_llama / "config.json", tmp_path)
    metaspace_tokenizer("[INST] {{ messages[0].content }} [/INST]").save_pretrained(tmp_path)
    model = prompts(str(tmp_path))
    ids, start, _ = model.split(caption)
    assert text(model, ids[start:-1]).strip() == caption
    assert model.tokenizer.convert_ids_to_tokens(ids[-1]).startswith("▁")
    assert text(model, ids[:start]).rstrip().endswith(INSTRUCTION)


def test_a_template_does_not_date_the_features(with_template: Callable[[str | None], str]) -> None:
    template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today is {{ date_string }}. {{ messages[0].content }}<|eot_id|>"
    )
    model = prompts(with_template(template))
    assert "Today is 26 Jul 2024." in text(model, model.split("x").ids)


def test_a_slow_tokenizer_is_refused_with_the_fix(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"slow tokenizer.*save its tokenizer\.json"):
        prompts(str(tmp_path)).split("x")


def test_a_tokenizer_that_transformers_makes_of_nothing_is_none(tmp_path: Path) -> None:
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no words but special ones.*put its tokenizer\.json"):
        prompts(str(tmp_path)).split("x")


def test_a_missing_tokenizer_is_named_in_one_line(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer that loads.*put its tokenizer\.json") as caught:
        prompts(str(tmp_path)).split("x")
    assert "\n" not in str(caught.value)


def test_settings_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens of any is 0; it must be at least 1"):
        prompts("any", max_tokens=0)
    with pytest.raises(ValueError, match="no system turn"):
        prompts("any", template="plain", system="You paint.")


def metaspace_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    letters = [*" abcdefghijklmnopqrstuvwxyzDINST[]/:,."]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator([INSTRUCTION, "a red circle"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = template
    return fast


def beginning(folder: Path) -> Path:
    """The same tokenizer, that begins every text with its beginning-of-text token by itself, as Llama 3's does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    begin, number = tokenizer.bos_token, tokenizer.bos_token_id
    pieces = [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {begin: {"id": begin, "ids": [number], "tokens": [begin]}},
    }
    path.write_text(json.dumps(content))
    return folder
