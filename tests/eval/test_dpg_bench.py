"""DPG-Bench's rules against the official verdicts, its files, and its judges."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForQuestionAnswering,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from lidit.eval import dpg_bench
from lidit.eval.dpg_bench import Question, aggregate, gated, read_items, score, split, suite
from lidit.eval.dpg_golden import GOLDEN, difference
from lidit.eval.dpg_judges import BlipJudge, ChatJudge, first_word, load_judge
from lidit.eval.suite import BenchmarkError, Picture

SHARED = Path(os.environ.get("LIDIT_SHARED", Path(__file__).parents[2].parent / "shared"))
COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
ROWS = [
    ("7", "A red bench.", 1, "0", "entity - whole (bench)", "Is there a bench?"),
    ("7", "A red bench.", 2, "1", "attribute - color (bench, red)", "Is the bench red?"),
    ("vrd1", 'A cat, "asleep"', 1, "0", "entity - whole (cat)", "Is there a cat?"),
    ("vrd1", 'A cat, "asleep"', 2, "1", "entity - state (cat, asleep)", "Is the cat asleep?"),
    ("vrd1", 'A cat, "asleep"', 3, "1, 2", "global - (photo)", "Is it a photo?"),
]


def write_csv(folder: Path, rows: list[tuple] = ROWS) -> str:
    """A small dpg_bench.csv; returns its git hash-object."""
    folder.mkdir(exist_ok=True)
    with (folder / "dpg_bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS.split(","))
        for item, text, number, dependency, proposition, question in rows:
            writer.writerow([item, text, "k", number, dependency, "b", "d", proposition, question])
    content = (folder / "dpg_bench.csv").read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@pytest.fixture
def prompts_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dpg_bench, "GIT_BLOB", write_csv(tmp_path / "prompts"))
    return tmp_path / "prompts"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Images whose tiles are black, grey, light and white."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("7", "vrd1"):
        Image.fromarray(tiled()).save(folder / f"{name}.png")
    return folder


def tiled(side: int = 16) -> np.ndarray:
    image = np.zeros((2 * side, 2 * side, 3), np.uint8)
    image[:side, side:], image[side:, :side], image[side:, side:] = 80, 160, 240
    return image


class Stub:
    """Says yes to every question about tiles as light as `above`, but for the questions it denies."""

    label = "dpg-stub"

    def __init__(self, above: int = 0, denied: tuple[str, ...] = ()) -> None:
        self.above, self.denied, self.seen = above, denied, []

    def describe(self) -> dict:
        return {"model": "stub"}

    def answers(self, image: np.ndarray, questions: list[str]) -> list[str]:
        self.seen.append((int(image.max()), image.shape))
        return ["yes" if image.min() >= self.above and q not in self.denied else "no" for q in questions]


def judged_by(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr(dpg_bench, "load_judge", lambda name, device: stub)
    return stub


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_cases(name: str) -> None:
    path = SHARED / "data" / "golden" / name
    if not path.is_file():
        pytest.skip(f"{path} is not here; set LIDIT_SHARED to the folder that holds data/golden")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    results = list(GOLDEN[name](cases))
    assert [id for id, _ in results] == [case["id"] for case in cases]
    assert [result for result in results if result[1]] == []


def test_a_golden_case_that_differs_is_said() -> None:
    question = {"qid": 1, "tuple": "entity - whole (cat)", "dependency": [0], "question": "Is there a cat?"}
    expected = {"error": None, "tile_scores": [1.0], "score": 1.0, "category_scores": {"1": 1}}
    case = {"id": "x", "questions": [question], "answers": [{"1": "Yes"}], "expected": expected}
    assert list(GOLDEN["dpg_cases.jsonl"]([case])) == [("x", "tile_scores[0]: 0.0 instead of 1.0")]
    case["answers"] = [{"1": "yes"}]
    assert list(GOLDEN["dpg_cases.jsonl"]([case])) == [("x", None)]
    case["expected"] = {"error": "KeyError", "missing_qid": 3}
    assert "instead of ['error', 'missing_qid']" in str(list(GOLDEN["dpg_cases.jsonl"]([case]))[0][1])


@pytest.mark.parametrize(
    ("found", "expected", "text"),
    [
        ({"a": [1.0, {"b": 2}]}, {"a": [1.0, {"b": 2 + 1e-12}]}, None),
        ({"a": [1.0, {"b": 2}]}, {"a": [1.0, {"b": 3}]}, "a[1].b: 2 instead of 3"),
        ([1], [1, 2], ": [1] instead of [1, 2]"),
        ({"a": 1}, {"a": 1, "b": 2}, "result: ['a'] instead of ['a', 'b']"),
        (1, "1", ": 1 instead of '1'"),
    ],
)
def test_the_first_difference_is_found(found: object, expected: object, text: str | None) -> None:
    assert difference(found, expected) == text


def questions(*parents: tuple[int, ...]) -> dict[int, Question]:
    return {i: Question("?", "entity - whole", of) for i, of in enumerate(parents, 1)}


def test_zeroes_cascade_in_the_order_of_the_questions() -> None:
    chain = questions((0,), (1,), (2,))
    assert gated({1: 0, 2: 1, 3: 1}, chain) == {1: 0, 2: 0, 3: 0}
    backwards = dict(reversed(chain.items()))
    assert gated({1: 0, 2: 1, 3: 1}, backwards) == {1: 0, 2: 0, 3: 1}  # 3 was looked at before 2 was zeroed


def test_an_unknown_parent_raises_only_where_it_is_looked_at() -> None:
    with pytest.raises(KeyError, match="9"):
        gated({1: 1, 2: 1}, questions((0,), (1, 9)))
    assert gated({1: 0, 2: 1}, questions((0,), (1, 9))) == {1: 0, 2: 0}


def test_a_number_as_item_id_stays_text() -> None:
    text = f"{COLUMNS}\n007,p,k,1,0,b,d,global - (x),q\n"
    assert list(read_items(text)) == ["007"]
    assert read_items(text, skip_first=True) == {}


def test_suite_is_one_image_of_four_tiles_per_prompt(prompts_dir: Path) -> None:
    found = suite(prompts_dir)
    assert found.pictures == [
        Picture("7.png", "A red bench.", tiles=4),
        Picture("vrd1.png", 'A cat, "asleep"', tiles=4),
    ]
    sha = hashlib.sha256((prompts_dir / "dpg_bench.csv").read_bytes()).hexdigest()
    assert found.sources == {str(prompts_dir / "dpg_bench.csv"): sha}


def test_another_csv_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BenchmarkError, match=r"dpg_bench.csv is missing; get it from https://github.com/TencentQQGYLab"
    ):
        suite(tmp_path)
    found = write_csv(tmp_path)
    with pytest.raises(BenchmarkError, match=f"gives {found}, expected 98457fc9901943f51ff9a30367250fc292533bed"):
        suite(tmp_path)
    with pytest.raises(BenchmarkError, match="expected 98457fc"):
        score(tmp_path, tmp_path)


def test_both_scores_of_a_run(prompts_dir: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last tile is affirmed, but for the cat, on which the other two questions of vrd1 depend."""
    judged_by(Stub(above=200, denied=("Is there a cat?",)), monkeypatch)
    found = score(run, prompts_dir)
    fixed, official = found["fixed"], found["official"]
    assert fixed["per_image"] == {
        "7": {"tile_scores": [0, 0, 0, 1], "score": 0.25},
        "vrd1": {"tile_scores": [0, 0, 0, 0], "score": 0},
    }
    assert fixed["dpg_score"] == 12.5
    assert fixed["l2"] == {"entity - whole": 12.5, "attribute - color": 25, "entity - state": 25, "global -": 25}
    assert fixed["l1"] == {"entity": pytest.approx(100 * 2 / 12), "attribute": 25, "global": 25}
    assert fixed["failed"] == []
    assert official["failed"] == ["7"]  # its first question was skipped, on which the second depends
    assert official["dpg_score"] == 0
    assert official["l2"] == {"entity - whole": 0, "entity - state": 100, "global -": 100}  # ungated, last tile
    assert found["name"] == "dpg-stub"
    assert found["answers"] == {"yes": 4, "no": 16, "other": 0}
    assert (found["images_scored"], found["images_demanded"], found["missing"], found["tile"]) == (2, 2, [], 16)
    assert found["scores"] == {
        "official average": 0,
        "official entity": 50,
        "official global": 100,
        "fixed average": 12.5,
        "fixed entity": pytest.approx(100 * 2 / 12),
        "fixed attribute": 25,
        "fixed global": 25,
    }
    json.dumps(found)


def test_where_officially_nothing_is_left_only_the_fixed_score_is_given(
    prompts_dir: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(Stub(), monkeypatch)
    (run / "vrd1.png").unlink()
    found = score(run, prompts_dir, allow_missing=True)
    assert found["official"] == {"failed": ["7"]}
    assert found["scores"] == {"fixed average": 100, "fixed entity": 100, "fixed attribute": 100}


def test_tiles_are_judged_row_by_row(prompts_dir: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = judged_by(Stub(), monkeypatch)
    score(run, prompts_dir)
    assert stub.seen == 2 * [(0, (16, 16, 3)), (80, (16, 16, 3)), (160, (16, 16, 3)), (240, (16, 16, 3))]


def test_missing_images_are_refused_unless_allowed(
    prompts_dir: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(Stub(), monkeypatch)
    (run / "7.png").unlink()
    with pytest.raises(BenchmarkError, match=r"1 of 2 images; the first missing one is 7.png"):
        score(run, prompts_dir)
    found = score(run, prompts_dir, allow_missing=True)
    assert (found["images_scored"], found["images_demanded"], found["missing"]) == (1, 2, ["7"])
    assert found["fixed"]["dpg_score"] == 100
    (run / "vrd1.png").unlink()
    with pytest.raises(BenchmarkError, match="0 of 2 images"):
        score(run, prompts_dir, allow_missing=True)


@pytest.mark.parametrize(
    ("shape", "tile", "message"),
    [
        ((32, 32), 32, "7.png is 32x32, not two by two tiles of 32 px"),
        ((32, 48), None, "7.png is 48x32"),
        ((33, 33), None, "7.png is 33x33"),
        ((64, 64), None, "vrd1.png is 32x32, not two by two tiles of 32 px"),
    ],
)
def test_a_wrong_resolution_is_an_error_before_anything_is_judged(
    prompts_dir: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    tile: int | None,
    message: str,
) -> None:
    stub = judged_by(Stub(), monkeypatch)
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(run / "7.png")
    with pytest.raises(BenchmarkError, match=message):
        score(run, prompts_dir, tile=tile)
    assert stub.seen == []


def test_an_unreadable_image_is_an_error_before_anything_is_judged(
    prompts_dir: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = judged_by(Stub(), monkeypatch)
    (run / "vrd1.png").write_bytes((run / "vrd1.png").read_bytes()[:60])
    with pytest.raises(BenchmarkError, match="vrd1.png cannot be read"):
        score(run, prompts_dir)
    assert stub.seen == []


def test_a_tile_that_fits_is_taken() -> None:
    assert [int(t.max()) for t in split(tiled(8), 8, "x")] == [0, 80, 160, 240]


def test_nothing_that_can_be_scored_is_said_not_divided_by() -> None:
    assert aggregate({}, {"7": [{1: "yes"}]}) == {"failed": ["7"]}


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes.", "yes"), (" **yes**, it is", "yes"), ("no", "no"), ("", ""), ("...", ""), ("Not yes", "not")],
)
def test_the_first_word_counts(answer: str, word: str) -> None:
    assert first_word(answer) == word


# judges of the real classes, with random weights


def bert_tokenizer() -> BertTokenizerFast:
    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 2748: "yes", 2053: "no"}
    words |= dict(enumerate(["is", "there", "a", "bench", "the", "red", "?", "cat", "it", "asleep"], 5000))
    vocabulary = {words.get(i, f"filler{i}"): i for i in range(30522)}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=sizes | {"encoder_hidden_size": 32}, vision_config=sizes | {"image_size": 32, "patch_size": 16}
    )
    BlipForQuestionAnswering(config).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return folder


def leaning(judge: BlipJudge, *ids: int) -> BlipJudge:
    """Makes it write one of these tokens, whichever is likelier, and then nothing but these."""
    bias = judge._model.text_decoder.cls.predictions.bias
    with torch.no_grad():
        bias[list(ids)] += 100
    return judge


@pytest.mark.parametrize(("token", "points"), [(2748, 100), (2053, 0)])
def test_blip_judges_a_run(prompts_dir: Path, run: Path, blip: Path, monkeypatch, token: int, points: int) -> None:
    monkeypatch.setattr(dpg_bench, "load_judge", lambda name, device: leaning(load_judge(name, device), token))
    found = score(run, prompts_dir, judge=str(blip))
    assert found["name"] == "dpg-blip"
    assert found["judge"]["model"] == str(blip)
    assert found["fixed"]["dpg_score"] == points
    assert found["answers"]["other"] == 0


def test_blip_answers_with_the_likelier_of_yes_and_no_as_its_own_generate_does(blip: Path) -> None:
    judge = leaning(BlipJudge(str(blip)), 2748, 2053)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in judge._model.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise), alpha=0.2)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    asked = ["Is there a bench?", "Is the bench red?", "Is the cat asleep?", "Is it?", "Is there a red red cat?"]
    middle = torch.tensor(judge(image, asked)).logit().median()
    with torch.no_grad():
        judge._model.text_decoder.cls.predictions.bias[2748] -= middle - 1e-3
    words = ["yes" if likely > 0.5 else "no" for likely in judge(image, asked)]
    assert words.count("yes") == 3
    assert judge.answers(image, asked) == words
    for question, word in zip(asked, words, strict=True):
        ids = bert_tokenizer()(question, return_tensors="pt")["input_ids"]
        ids[0, 0] = 30523
        written = judge._model.generate(input_ids=ids, pixel_values=judge.pixels(image), max_length=10)
        assert bert_tokenizer().decode(written[0, 1:], skip_special_tokens=True).split()[0] == word


SPECIALS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
PADS = ["<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=275, special_tokens=SPECIALS + PADS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["yes no <think>"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[1],
        pad_token=SPECIALS[0],
        additional_special_tokens=SPECIALS[2:] + PADS,
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judges") / "Tiny-Qwen2.5-VL"
    tokenizer = chat_tokenizer()
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    marks = dict(zip(names, tokenizer.convert_tokens_to_ids(SPECIALS[3:] + PADS), strict=True))
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"vocab_size": len(tokenizer), "intermediate_size": 64, "initializer_range": 0.4, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.4}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, eos_token_id=1, **marks)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    images = Qwen2VLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096})
    videos = Qwen2VLVideoProcessor(patch_size=4)
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


QUESTIONS = ["Is it red?", "Is there a very long green bench with three legs in the picture?", "Cat?", "Is it a photo?"]


def spied(judge: ChatJudge, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the model writes, question by question, without the padding after an end."""
    written, generate = [], judge._model.generate

    def spy(**inputs: torch.Tensor) -> torch.Tensor:
        ids = generate(**inputs)
        written.extend(ids[:, inputs["input_ids"].shape[1] :])
        return ids

    monkeypatch.setattr(judge._model, "generate", spy)
    return written


def test_a_chat_model_answers_alike_alone_and_among_others(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = load_judge(str(qwen))
    assert isinstance(judge, ChatJudge)
    assert judge.label == "dpg-tiny-qwen2.5-vl"
    assert judge.describe()["question"] == "{question} Answer with yes or no only."
    written = spied(judge, monkeypatch)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    together = judge.answers(image, QUESTIONS)
    alone = [judge.answers(image, [question])[0] for question in QUESTIONS]
    assert together == alone
    assert [w.tolist()[:3] for w in written[:4]] == [w.tolist()[:3] for w in written[4:]]
    assert len({tuple(w.tolist()) for w in written[:4]}) > 1  # the question matters
    other = len(written)
    judge.answers(255 - image, QUESTIONS)
    assert any(not torch.equal(a, b) for a, b in zip(written[:4], written[other:], strict=True))  # and the image


@pytest.mark.parametrize(("says", "points"), [("Yes.<|im_end|>", 100), ("No, it is not", 0)])
def test_a_chat_model_judges_a_run(
    prompts_dir: Path, run: Path, qwen: Path, monkeypatch: pytest.MonkeyPatch, says: str, points: int
) -> None:
    judge = load_judge(str(qwen))
    asked = speaking(judge, says, monkeypatch)
    monkeypatch.setattr(dpg_bench, "load_judge", lambda name, device: judge)
    found = score(run, prompts_dir, judge=str(qwen))
    assert (found["name"], found["fixed"]["dpg_score"]) == ("dpg-tiny-qwen2.5-vl", points)
    first = judge._processor.tokenizer.decode(asked[0][0], skip_special_tokens=False)
    assert first.endswith(
        "<|vision_end|>Is there a bench? Answer with yes or no only.<|im_end|>\n<|im_start|>assistant\n"
    )


def speaking(judge: ChatJudge, text: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Puts an answer into its mouth; returns the list of what it was asked."""
    asked: list[torch.Tensor] = []
    answer = judge._processor.tokenizer(text, return_tensors="pt")["input_ids"]

    def generate(**inputs: torch.Tensor) -> torch.Tensor:
        asked.append(inputs["input_ids"])
        return torch.cat([inputs["input_ids"], answer.expand(len(inputs["input_ids"]), -1)], 1)

    monkeypatch.setattr(judge._model, "generate", generate)
    return asked


def test_a_model_that_thinks_aloud_is_refused(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ChatJudge(str(qwen))
    speaking(judge, "<think> The picture", monkeypatch)
    with pytest.raises(BenchmarkError, match="thinks aloud before it answers; name an instruct model"):
        judge.answers(tiled(), QUESTIONS)


def test_judges_that_cannot_be_had(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"nobody/nothing cannot be loaded as a judge"):
        load_judge("nobody/nothing")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(BenchmarkError, match=r"llama cannot be loaded as a judge .*chat model that reads images"):
        load_judge(str(tmp_path / "llama"))
