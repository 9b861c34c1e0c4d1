"""What the filter removes, and that it says so: each rule alone, then whole collections to shards."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import data_prep.filter as module
from data_prep.aesthetic import AestheticModel
from data_prep.filter import filter_records
from data_prep.filter_rules import WORD, Aesthetic, Limit, Rules, dhash, near_duplicates, tags
from data_prep.shard import shard
from data_prep.sources import Columns
from lidit.arguments import call
from lidit.data.index import ShardIndex

PAPER = Path(__file__).parents[2] / "experiments/configs/filter_paper.yaml"
SQUARE = (100, 100)


def broken(rules: Rules, caption: str = "a good caption", size: tuple[int, int] = SQUARE, **columns: object) -> str:
    verdict = rules.broken_by(size, caption, columns)
    return verdict[0] if verdict else ""


# rules


@pytest.mark.parametrize(
    ("size", "goes"), [((256, 256), False), ((255, 900), True), ((900, 255), True), ((1, 1), True)]
)
def test_min_side_is_of_the_shorter_side(size: tuple[int, int], goes: bool) -> None:
    assert (broken(Rules(min_side=256), size=size) == "min_side") == goes


@pytest.mark.parametrize(("size", "goes"), [((300, 100), False), ((301, 100), True), ((100, 301), True)])
def test_aspect_limits_hold_both_ways(size: tuple[int, int], goes: bool) -> None:
    assert (broken(Rules(max_aspect=3), size=size) == "max_aspect") == goes


@pytest.mark.parametrize(
    "caption",
    [
        *("see https://x.org/a", "HTTP://X", "at www.shop", "Photo by etsy.com", "news.example.co.uk today"),
        *("visit my-site.net!", "Shop.COM"),
    ],
)
def test_captions_with_urls_go(caption: str) -> None:
    assert broken(Rules(remove_urls=True), caption) == "remove_urls"


@pytest.mark.parametrize(
    "caption", ["a cat.dog stays", "3.5 km of road", "Mr. Commons", "e.g. a net", "the end.Then more", "U.S.A."]
)
def test_captions_without_urls_stay(caption: str) -> None:
    assert broken(Rules(remove_urls=True), caption) == ""


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("cat", 1),
        ("", 0),
        ("😀 😀", 0),
        ("-- !", 0),
        ("two words", 2),
        ("it's one-off", 2),
        ("café au lait", 3),
        ("一只红色的猫", 6),  # Chinese has no spaces
        ("猫", 1),
        ("красный круг", 2),
        ("ein roter Kreis", 3),
        ("猫cat", 2),
    ],
)
def test_words_are_counted_in_any_language(caption: str, count: int) -> None:
    assert len(WORD.findall(caption)) == count
    assert (broken(Rules(min_words=2), caption) == "min_words") == (count < 2)


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("cat, dog, cute pet, animal, home", 5),
        ("cat;dog|bird", 3),
        ("sunset #love #nofilter", 2),
        ("#a #b red, blue", 4),
        ("红色, 蓝色，绿色、黄色", 4),
        ("A green bench, a red car, a blue bowl, and a pink apple.", 0),  # of the positional-bias benchmark
        ("A quiet street at dusk, with lamps", 0),
        ("a cat", 0),
        ("", 0),
        (",,,", 0),
        ("C# is a language", 0),
    ],
)
def test_tags_are_told_from_sentences(caption: str, count: int) -> None:
    assert tags(caption) == count
    assert broken(Rules(max_tags=4), caption) == ("max_tags" if count > 4 else "")


@pytest.mark.parametrize("caption", ["a <b>cat</b>", "x<br/>y", '<img src="a">'])
def test_html_counts_as_tags(caption: str) -> None:
    assert broken(Rules(max_tags=100), caption) == "max_tags"
    assert broken(Rules(max_tags=100), "1 < 2 > 0 and a<3") == ""


@pytest.mark.parametrize(
    ("limit", "value", "why"),
    [
        (Limit(min=4.7), 4.7, ""),
        (Limit(min=4.7), 4.69, "4.69 is below 4.7"),
        (Limit(min=4.7), "4.71", ""),  # a CSV has only text
        (Limit(max=0.5), "0.6", "0.6 is above 0.5"),
        (Limit(max=0.5), 0, ""),
        (Limit(max=0.5), "high", "'high' is not a number"),
        (Limit(max=0.5), [1], "[1] is not a number"),
        (Limit(max=0.5), None, "no value"),
        (Limit(max=0.5), "", "no value"),
        (Limit(max=0.5), float("nan"), "no value"),
        (Limit(max=0.5), "nan", "nan is above 0.5"),
        (Limit(max=0.5, missing=True), None, ""),
        (Limit(min=1, max=2), 3, "3 is above 2"),
        (Limit(allowed=["UNLIKELY"]), "UNLIKELY", ""),
        (Limit(allowed=["UNLIKELY"]), "NSFW", "NSFW is not one of UNLIKELY"),
        (Limit(allowed=["0"]), 0, ""),
    ],
)
def test_columns_are_limited(limit: Limit, value: object, why: str) -> None:
    assert limit.broken_by(value) == why


def test_a_record_counts_for_the_first_rule_it_breaks() -> None:
    rules = Rules(min_side=200, min_words=2, columns={"nsfw": Limit(max=0.5)})
    assert broken(rules, "cat", nsfw=1) == "min_side"
    assert broken(rules, "cat", (200, 200), nsfw=1) == "min_words"
    assert broken(rules, size=(200, 200), nsfw=1) == "columns.nsfw"
    assert broken(rules, size=(200, 200), nsfw=0) == ""


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(), "there are no rules"),
        (Rules(near_duplicate_bits=8), "near_duplicate_bits is 8; it is 0 to 7"),
        (Rules(near_duplicate_bits=-1), "near_duplicate_bits is -1"),
        (Rules(max_aspect=0.5), "max_aspect is 0.5"),
        (Rules(columns={"nsfw": Limit()}), "columns.nsfw has no min, max or allowed"),
    ],
)
def test_rules_that_cannot_be_honoured_are_refused(rules: Rules, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        filter_records("table", str(tmp_path), str(tmp_path / "out"), rules)
    assert not (tmp_path / "out").exists()


# perceptual hash


def picture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Smooth, and unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_the_hash_is_where_brightness_rises() -> None:
    rising = Image.fromarray(np.arange(9, dtype=np.uint8)[None].repeat(8, 0) * 20)
    assert dhash(rising) == (1 << 64) - 1
    assert dhash(rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    spot = np.zeros((8, 9), np.uint8)
    spot[7, 8] = 99  # the last pair of the last row
    assert dhash(Image.fromarray(spot)) == 1


def test_scaled_and_compressed_copies_have_nearly_the_same_hash_and_others_do_not() -> None:
    for seed in range(20):
        copy = Image.open(io.BytesIO(jpeg(picture(seed).resize((70, 60)), 60)))
        assert (dhash(picture(seed)) ^ dhash(copy)).bit_count() <= 3
    hashes = [dhash(picture(seed)) for seed in range(100)]
    distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 7


@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_near_duplicates_are_those_a_comparison_of_all_finds(bits: int) -> None:
    chance = random.Random(bits)
    hashes = [chance.getrandbits(64) for _ in range(150)]
    for base in hashes[:100]:  # copies with 0 to 9 other bits, some of them near to several
        for bit in chance.sample(range(64), chance.randrange(10)):
            base ^= 1 << bit
        hashes.append(base)
    kept: list[int] = []
    expected = set()
    for i, own in enumerate(hashes):
        if any((own ^ hashes[j]).bit_count() <= bits for j in kept):
            expected.add(i)
        else:
            kept.append(i)
    found = near_duplicates(hashes, bits)
    assert set(found) == expected
    assert expected
    assert all(match in kept and (hashes[i] ^ hashes[match]).bit_count() <= bits for i, match in found.items())


def test_many_equal_pictures_are_no_trouble() -> None:
    assert len(near_duplicates([0] * 20_000, 3)) == 19_999


# collections


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A table of eight pictures with something wrong with all but the first two and the last."""
    folder = tmp_path / "raw"
    folder.mkdir()
    files = {f"{i}.jpg": jpeg(picture(i)) for i in range(8)}
    files |= {"small.jpg": jpeg(picture(9, 40, 96)), "broken.jpg": files["1.jpg"][:-400], "empty.jpg": b""}
    files |= {
        "copy.jpg": files["0.jpg"],
        "near.jpg": jpeg(picture(1, 80, 80), 70),
        "larger.jpg": jpeg(picture(7, 128, 128)),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rows = [
        ("0.jpg", "a first good caption", 5.0, 0.1),
        ("1.jpg", "a second good caption 😀", 6.0, 0.2),
        ("2.jpg", "see shop.com for more", 6.0, 0.1),
        ("3.jpg", "cat, dog, pet, animal, cute", 6.0, 0.1),
        ("4.jpg", "word", 6.0, 0.1),
        ("5.jpg", "an ugly picture of it", 4.6, 0.1),
        ("6.jpg", "a picture with marks", 6.0, 0.9),
        ("7.jpg", "the smaller of two", 6.0, 0.1),
        ("small.jpg", "a small picture here", 6.0, 0.1),
        ("broken.jpg", "a broken picture here", 6.0, 0.1),
        ("empty.jpg", "an empty file here", 6.0, 0.1),
        ("copy.jpg", "the first one again", 6.0, 0.1),
        ("near.jpg", "the second one smaller", 6.0, 0.1),
        ("2.jpg", "", 6.0, 0.1),
        ("larger.jpg", "the larger of two", 6.0, 0.1),
    ]
    header = ("image", "caption", "score", "watermark")
    lines = [json.dumps(dict(zip(header, row, strict=True))) for row in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


ALL = Rules(
    min_side=64,
    max_aspect=3,
    min_words=2,
    remove_urls=True,
    max_tags=4,
    columns={"score": Limit(min=4.7), "watermark": Limit(max=0.5)},
    remove_duplicates=True,
    near_duplicate_bits=3,
)
REMOVED = {
    "00000002": "remove_urls",
    "00000003": "max_tags",
    "00000004": "min_words",
    "00000005": "columns.score",
    "00000006": "columns.watermark",
    "00000007": "near_duplicate_bits",  # the larger one comes later and stays
    "00000008": "min_side",
    "00000009": "broken image",
    "00000010": "empty file",
    "00000011": "remove_duplicates",
    "00000012": "near_duplicate_bits",
    "00000013": "no caption",
}


def run(raw: Path, out: Path, rules: Rules = ALL, **options: object) -> Path:
    filter_records("table", str(raw), str(out), rules, **{"workers": 1} | options)
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(folder: Path) -> list[str]:
    return [line["key"] for line in lines(folder / "kept.jsonl")[1:]]


def test_each_record_goes_by_its_rule_and_is_counted(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = run(raw, tmp_path / "out")
    assert {line["key"]: line["rule"] for line in lines(out / "removed.jsonl")} == REMOVED
    assert kept(out) == ["00000000", "00000001", "00000014"]
    report = json.loads((out / "report.json").read_text())
    counts = {rule: list(REMOVED.values()).count(rule) for rule in REMOVED.values()} | {"max_aspect": 0}
    assert (report["records"], report["kept"], report["removed"]) == (15, 3, counts)
    assert report["rules"]["columns"]["score"]["min"] == 4.7
    said = capsys.readouterr().out
    assert "12 of 15 records (80.0%) are removed, 3 stay" in said
    for text in ("remove_urls: 1", "00000002: see shop.com for more", "00000005: 4.6 is below 4.7", "max_aspect: 0"):
        assert text in said
    assert "00000011: the same file as 00000000" in said


def test_with_two_processes_the_same_goes(raw: Path, tmp_path: Path) -> None:
    one, two = run(raw, tmp_path / "one"), run(raw, tmp_path / "two", workers=2)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_what_stays_becomes_shards(raw: Path, tmp_path: Path) -> None:
    out = run(raw, tmp_path / "out")
    settings = {"source": "table", "path": str(raw), "keep": str(out / "kept.jsonl"), "workers": 1}
    shard(str(tmp_path / "s"), **settings, shuffle=False)
    index = ShardIndex(str(tmp_path / "s"))
    assert [index.key(i) for i in range(len(index))] == kept(out)
    assert index.text(1)["caption"] == "a second good caption 😀"


def test_a_dry_run_says_what_would_go_and_writes_no_lists(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = run(raw, tmp_path / "out", dry_run=True)
    assert "12 of 15 records (80.0%) would be removed, 3 stay" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["filter.json", "measured.jsonl"]


def test_other_rules_measure_nothing_again(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(raw, tmp_path / "out", dry_run=True)
    monkeypatch.setattr(module, "decode", None)  # whoever decodes now fails
    assert len(kept(run(raw, out, Rules(min_words=2)))) == 11
    assert len(kept(run(raw, out))) == 3


def test_an_interrupted_measurement_continues(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(raw, tmp_path / "whole")
    decode, calls = module.decode, iter(range(6))

    def failing(data: bytes) -> Image.Image:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return decode(data)

    monkeypatch.setattr(module, "CHUNK", 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "decode", failing)
        with pytest.raises(KeyboardInterrupt):
            run(raw, tmp_path / "out")
    measured = tmp_path / "out" / "measured.jsonl"
    assert len(lines(measured)) == 6
    with measured.open("a") as file:
        file.write('{"key": "0000')  # what a killed process leaves
    out = run(raw, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_folder_of_another_collection_is_refused(raw: Path, tmp_path: Path) -> None:
    out = run(raw, tmp_path / "out")
    with (raw / "captions.jsonl").open("a") as table:
        table.write('\n{"image": "0.jpg", "caption": "one more row"}\n')
    with pytest.raises(ValueError, match="holds other data: records was 15 and is 16 now"):
        run(raw, out)


def test_a_column_that_no_record_has_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record has a column 'aesthetic'; there are caption, image, score"):
        run(raw, tmp_path / "out", Rules(columns={"aesthetic": Limit(min=4.7)}))


@pytest.mark.slow
def test_the_terminal_shows_what_it_can(raw: Path, tmp_path: Path) -> None:
    (raw / "captions.jsonl").write_text(
        '{"image": "0.jpg", "caption": "\U0001f600"}\n{"image": "1.jpg", "caption": "b c"}'
    )
    command = [sys.executable, "-m", "data_prep.filter", "--source", "table", "--path", str(raw), "--workers", "1"]
    command += ["--out", str(tmp_path / "out"), "--rules.min_words", "2"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "00000000: \\U0001f600" in done.stdout


# the aesthetic score

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "width": 16, "heads": 1, "layers": 1, "vocab_size": 49408}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of random weights in open_clip's format."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    return str(folder)


def head(path: Path, width: int = 16, bias: float = 5.0) -> str:
    """As LAION's: the state of nn.Linear(width, 1)."""
    torch.manual_seed(1)
    linear = torch.nn.Linear(width, 1)
    with torch.no_grad():
        linear.weight.mul_(20)
        linear.bias.fill_(bias)
    state = linear.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


def by_hand(clip: str, head: str, images: list[Image.Image]) -> list[float]:
    """As LAION's notebook does it."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    linear = torch.nn.Linear(16, 1)
    linear.load_state_dict(torch.load(head, weights_only=True))
    with torch.no_grad():
        features = model.eval().encode_image(torch.stack([preprocess(image) for image in images]))
        features /= features.norm(dim=-1, keepdim=True)
        return linear(features)[:, 0].tolist()


def test_scores_are_those_of_laions_recipe(clip: str, tmp_path: Path) -> None:
    images = [picture(seed) for seed in range(5)]
    rule = Aesthetic(head=head(tmp_path / "head.pth"), pretrained=clip)
    expected = by_hand(clip, rule.head, images)
    assert AestheticModel(rule, batch_size=2)([np.asarray(image) for image in images]) == pytest.approx(
        expected, abs=1e-4
    )
    assert np.std(expected) > 0.01
    safe = Aesthetic(head=head(tmp_path / "head.safetensors"), pretrained=clip)
    assert AestheticModel(safe)([np.asarray(images[0])]) == pytest.approx(expected[:1], abs=1e-4)


def test_low_scores_go_and_are_computed_once(
    raw: Path, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laion = head(tmp_path / "head.pth")
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "5.jpg", "6.jpg", "7.jpg"]
    scores = by_hand(clip, laion, [Image.open(raw / name) for name in names])
    middle = float(np.median(scores))
    rules = Rules(min_words=2, aesthetic=Aesthetic(middle, laion, pretrained=clip))
    out = run(raw, tmp_path / "out", rules, batch_size=3)
    gone = {line["key"]: line for line in lines(out / "removed.jsonl") if line["rule"] == "aesthetic"}
    low = {f"0000000{name[0]}" for name, score in zip(names, scores, strict=True) if score < middle - 1e-4}
    assert low <= set(gone)
    high = {f"0000000{name[0]}" for name, score in zip(names, scores, strict=True) if score > middle + 1e-4}
    assert high <= set(kept(out))
    (stored,) = out.glob("aesthetic-*.jsonl")
    assert len(lines(stored)) == 11  # not of those that were gone already
    with monkeypatch.context() as patch:
        patch.setattr(module, "_pixels", None)
        stricter = Rules(min_words=2, aesthetic=Aesthetic(99, laion, pretrained=clip))
        run(raw, out, stricter)
    assert kept(out) == []
    other = Rules(min_words=2, aesthetic=Aesthetic(0, head(tmp_path / "other.pth", bias=6.0), pretrained=clip))
    run(raw, out, other)
    assert len(list(out.glob("aesthetic-*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "head.pth is missing; get it from github.com/LAION-AI/aesthetic-predictor"),
        (b"no weights", "holds no linear head"),
        ({"layers.0.weight": torch.zeros(2, 2)}, "holds no linear head"),
        ({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, "features of width 8, and this CLIP's have 16"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(
    content: object, message: str, raw: Path, clip: str, tmp_path: Path
) -> None:
    path = tmp_path / "head.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, OSError), match=message):
        run(raw, tmp_path / "out", Rules(aesthetic=Aesthetic(head=str(path), pretrained=clip)))


# the recipe


def test_the_papers_recipe_is_read_and_can_be_changed_on_the_command_line(raw: Path, clip: str, tmp_path: Path) -> None:
    arguments = ["--config", str(PAPER), "--source", "table", "--path", str(raw), "--out", str(tmp_path / "out")]
    arguments += ["--workers", "1", "--rules.min_side", "64"]
    arguments += ["--rules.aesthetic.head", head(tmp_path / "head.pth", bias=0.0), "--rules.aesthetic.pretrained", clip]
    call(filter_records, "lidit prep filter", arguments)
    rules = json.loads((tmp_path / "out" / "report.json").read_text())["rules"]
    assert rules["aesthetic"]["min"] == 4.7
    assert rules["min_side"] == 64
    assert rules["remove_urls"] is True
    arguments += ["--rules.aesthetic", "null", "--rules.columns", "{score: {min: 4.7}}"]
    call(filter_records, "lidit prep filter", arguments)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["removed"]["columns.score"] == 1


def test_what_the_recipe_only_suggests_is_right_too(raw: Path, tmp_path: Path) -> None:
    text = PAPER.read_text()
    suggested = [line.removeprefix("# ") for line in text[text.index("# The paper names none") :].splitlines()[1:]]
    recipe = yaml.safe_load(text.partition("# The paper names none")[0] + "\n".join(suggested))
    recipe["rules"] |= {"aesthetic": None, "min_side": None}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(recipe))
    rows = lines(raw / "captions.jsonl")
    rows = [row | {"pwatermark": 0.1, "punsafe": 0.1, "NSFW": "UNLIKELY"} for row in rows]
    (raw / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--config", str(tmp_path / "rules.yaml"), "--source", "table", "--path", str(raw), "--workers", "1"]
    call(filter_records, "lidit prep filter", [*arguments, "--out", str(tmp_path / "out")])
    assert len(kept(tmp_path / "out")) == 6


def test_images_and_class_folders_are_filtered_without_a_table(raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw, tmp_path / "classes" / "red_things")
    (tmp_path / "classes/red_things/captions.jsonl").unlink()
    path, out = str(tmp_path / "classes"), tmp_path / "out"
    filter_records("imagenet", path, str(out), Rules(remove_duplicates=True), Columns(), workers=1)
    gone = {line["key"]: line["rule"] for line in lines(out / "removed.jsonl")}
    assert gone == {
        "red_things/broken": "broken image",
        "red_things/copy": "remove_duplicates",
        "red_things/empty": "empty file",
    }


def test_rules_without_a_score_import_no_torch() -> None:
    code = "import sys, data_prep.filter; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
