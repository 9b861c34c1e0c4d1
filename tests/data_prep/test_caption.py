"""Captioned shards are the old ones with what the model says beside what was there."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from data_prep.caption import Captioner, caption
from lidit.data.datamodule import ShardData
from lidit.data.index import COLUMNS, ShardIndex, read_index, scan

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIALS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
PICTURES = [(32, 32), (48, 32), (32, 32), (16, 64), (32, 48)]
SETTINGS = {"instruction": "What of {caption}?", "max_new_tokens": 8, "dtype": "float32", "batch_size": 2}


def template(image: str) -> str:
    part = f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    turn = f"<|user|>{{% for part in turn.content %}}{part}{{% endfor %}}<|end|>"
    answer = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    return f"{{% for turn in messages %}}{turn}{{% endfor %}}{answer}"


def byte_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIALS, *more])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIALS[0], eos_token=SPECIALS[1])


def text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**SIZES, "num_key_value_heads": 2, "vocab_size": len(tokenizer), **ends}


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """With weights large enough that what it says depends on the image and on every word."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def save_llava(folder: Path) -> None:
    """Every image is as many tokens."""
    tokenizer = byte_tokenizer("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
        text_config=LlamaConfig(**text_sizes(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    lively(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size=square, crop_size=square),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    ).save_pretrained(folder)


def save_qwen(folder: Path) -> None:
    """The larger an image, the more tokens; images of other shapes than 200:1 at most are refused."""
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer = byte_tokenizer(*(f"<|{name}|>" for name in names))
    ids = {f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**text_sizes(tokenizer), "rope_parameters": rope}, vision_config=vision, **ids)
    lively(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=8),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def vlms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two models of real classes with random weights."""
    folder = tmp_path_factory.mktemp("vlms")
    for name, save in (("llava", save_llava), ("qwen", save_qwen)):
        torch.manual_seed(0)
        save(folder / name)
    return {name: str(folder / name) for name in ("llava", "qwen")}


def jpeg(size: tuple[int, int], seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.5  # a stranger's tar has times
            archive.addfile(info, io.BytesIO(data))


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of a stranger: JPEGs of several shapes, in folders, without an index, with labels beside them."""
    folder = tmp_path_factory.mktemp("raw") / "raw"
    for shard in range(2):
        files = {}
        for i, size in enumerate(PICTURES):
            record = {"caption": f"picture {shard}{i} 🟥", "url": "there"}
            files[f"set{shard}/{i}.jpg"] = jpeg(size, 10 * shard + i)
            files[f"set{shard}/{i}.json"] = json.dumps(record, ensure_ascii=False).encode()
            files[f"set{shard}/{i}.cls"] = str(i).encode()
        write(folder / f"part-{shard}.tar", files)
    return folder


@pytest.fixture(scope="module")
def made(raw: Path, vlms: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "made"
    caption(str(raw), str(out), vlms["qwen"], **SETTINGS)
    return out


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_each_sample_gets_what_the_model_says_of_it_alone(
    raw: Path, vlms: dict[str, str], tmp_path: Path, name: str
) -> None:
    caption(str(raw), str(tmp_path / "c"), vlms[name], **SETTINGS)
    there, new = ShardIndex(str(raw)), ShardIndex(str(tmp_path / "c"))
    model = Captioner(vlms[name], "What of {caption}?", 8, "float32", None).load()
    said = [model([there.image(s)], [there.text(s)["caption"]])[0] for s in range(len(there))]
    assert [new.text(s)["dense"] for s in range(len(new))] == said
    assert len(set(said)) > len(said) / 2  # they depend on the sample, so that a mix-up would show


def test_everything_else_is_copied(raw: Path, made: Path) -> None:
    for shard in range(2):
        there, new = members(raw / f"part-{shard}.tar"), members(made / f"{shard:05d}.tar")
        assert list(there) == list(new)
        for name, data in there.items():
            if name.endswith(".json"):
                assert json.loads(new[name]) == json.loads(data) | {"dense": json.loads(new[name])["dense"]}
            else:
                assert new[name] == data


def test_the_index_is_that_of_the_new_shards(made: Path) -> None:
    for shard in range(2):
        stored, scanned = read_index(made / f"{shard:05d}.tar"), scan(made / f"{shard:05d}.tar")
        assert all(np.array_equal(stored[column], scanned[column]) for column in COLUMNS)
        assert stored["dense_chars"].any()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_training_mixes_original_and_synthetic_captions_by_a_probability(made: Path, probability: float) -> None:
    data = ShardData(str(made), batch_size=1, dense_probability=probability, caption_dropout=0.0)
    data.setup("fit")
    loader, index = iter(data.train_dataloader()), data.train_samples.index
    texts = {index.key(s): index.text(s) for s in range(len(index)) if index.column("dense_chars")[s]}
    seen = [batch for batch in (next(loader) for _ in range(len(index))) if batch.key[0] in texts]
    assert len(seen) == len(texts) > 0
    assert all(batch.prompt[0] == texts[batch.key[0]]["dense" if probability else "caption"] for batch in seen)


def test_the_original_caption_is_asked_about_only_where_the_instruction_says_so(vlms: dict[str, str]) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    for instruction, differ in (("What of {caption}?", True), ("What is there?", False)):
        model = Captioner(vlms["qwen"], instruction, 8, "float32", None).load()
        first, second = model([image, image], ["a red circle", "nine blue squares on a table"])
        assert (first != second) == differ


def test_running_again_reads_no_model_and_writes_nothing(
    raw: Path, made: Path, vlms: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Captioner, device: str) -> Captioner:
        raise AssertionError("the model was read")

    monkeypatch.setattr(Captioner, "load", load)
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    caption(str(raw), str(made), vlms["qwen"], **SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_an_interrupted_run_leaves_whole_shards_and_continues(
    raw: Path, made: Path, vlms: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, samples = ShardIndex.image, iter(range(8))

    def failing(index: ShardIndex, sample: int) -> np.ndarray:
        if next(samples, None) is None:
            raise OSError("the disk was taken away")
        return read(index, sample)

    out = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "image", failing)
        with pytest.raises(OSError, match="taken away"):
            caption(str(raw), str(out), vlms["qwen"], **SETTINGS)
    assert sorted(contents(out)) == ["00000.index.npz", "00000.tar", "shards.json"]
    kept = (out / "00000.tar").stat().st_mtime_ns
    caption(str(raw), str(out), vlms["qwen"], **SETTINGS)
    assert contents(out) == contents(made)
    assert (out / "00000.tar").stat().st_mtime_ns == kept


def test_a_truncated_shard_is_written_again(raw: Path, made: Path, vlms: dict[str, str], tmp_path: Path) -> None:
    caption(str(raw), str(tmp_path / "c"), vlms["qwen"], **SETTINGS)
    (tmp_path / "c" / "00001.tar").write_bytes(contents(made)["00001.tar"][:3000])
    caption(str(raw), str(tmp_path / "c"), vlms["qwen"], **SETTINGS)
    assert contents(tmp_path / "c") == contents(made)


def test_several_processes_make_the_shards_of_one(raw: Path, made: Path, vlms: dict[str, str], tmp_path: Path) -> None:
    caption(str(raw), str(tmp_path / "c"), vlms["qwen"], **SETTINGS, rank=1, world=2)
    assert sorted(contents(tmp_path / "c")) == ["00001.index.npz", "00001.tar", "shards.json"]
    caption(str(raw), str(tmp_path / "c"), vlms["qwen"], **SETTINGS, rank=0, world=2)
    assert contents(tmp_path / "c") == contents(made)


def test_other_settings_are_refused_with_the_difference(raw: Path, made: Path, vlms: dict[str, str]) -> None:
    before = contents(made)
    with pytest.raises(ValueError, match="holds other data: max_new_tokens was 8 and is 9 now"):
        caption(str(raw), str(made), vlms["qwen"], **SETTINGS | {"max_new_tokens": 9})
    with pytest.raises(ValueError, match="holds other data: model.name was 'qwen' and is 'llava' now"):
        caption(str(raw), str(made), vlms["llava"], **SETTINGS)
    with pytest.raises(ValueError, match="holds other data: shards was"):
        caption(str(raw / "part-0.tar"), str(made), vlms["qwen"], **SETTINGS)
    assert contents(made) == before


def test_captions_that_are_too_long_or_empty_are_counted(
    raw: Path, vlms: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    caption(str(raw), str(tmp_path / "c"), vlms["qwen"], **SETTINGS | {"max_new_tokens": 1})
    index = ShardIndex(str(tmp_path / "c"))
    empty = sum(index.text(s)["dense"] == "" for s in range(len(index)))
    assert capsys.readouterr().out.splitlines()[-1] == f"10 captions were cut at 1 tokens; {empty} are empty"


def test_an_image_that_cannot_be_decoded_is_named_and_copied(
    vlms: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = jpeg((300, 200), 0)[:5000]
    text = json.dumps({"caption": "words", "dense": "old words"}).encode()
    files = {"a.jpg": jpeg((32, 32), 1), "a.json": text, "b.jpg": broken, "b.json": text}
    write(tmp_path / "raw" / "0.tar", files)
    caption(str(tmp_path / "raw"), str(tmp_path / "c"), vlms["llava"], **SETTINGS)
    out = capsys.readouterr().out
    assert "sample b: the image cannot be decoded" in out
    assert "1 images cannot be decoded and get no caption" in out
    new = members(tmp_path / "c" / "00000.tar")
    assert (new["b.jpg"], new["b.json"]) == (broken, text)
    assert json.loads(new["a.json"])["dense"] != "old words"


def test_an_image_that_the_processor_refuses_is_named(vlms: dict[str, str], tmp_path: Path) -> None:
    text = json.dumps({"caption": "a line"}).encode()
    write(tmp_path / "raw" / "0.tar", {"a.jpg": jpeg((3000, 8), 1), "a.json": text})
    with pytest.raises(ValueError, match=r"cannot caption one of a \(3000x8\): .*aspect ratio"):
        caption(str(tmp_path / "raw"), str(tmp_path / "c"), vlms["qwen"], **SETTINGS)


def test_a_model_that_sees_nothing_is_refused_before_anything_is_written(raw: Path, llm: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model type 'llama' is not an image-text-to-text model"):
        caption(str(raw), str(tmp_path / "c"), llm)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        caption(str(raw), str(tmp_path / "c"), str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="s3://bucket is remote"):
        caption("s3://bucket", str(tmp_path / "c"), llm)
    assert not (tmp_path / "c").exists()


def test_a_model_without_a_chat_template_or_all_weights_is_refused(
    raw: Path, vlms: dict[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "vlm"
    copy.mkdir()
    for path in Path(vlms["llava"]).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    dropped = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != dropped}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit its config.json: .*missing_keys"):
        caption(str(raw), str(tmp_path / "c"), str(copy), **SETTINGS)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        caption(str(raw), str(tmp_path / "d"), str(copy), **SETTINGS)


@pytest.mark.parametrize("change", [{"max_new_tokens": 0}, {"batch_size": 0}, {"rank": 2, "world": 2}, {"rank": 1}])
def test_bad_arguments_leave_nothing_behind(raw: Path, vlms: dict[str, str], tmp_path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} is"):
        caption(str(raw), str(tmp_path / "c"), vlms["llava"], **SETTINGS | change)
    assert not (tmp_path / "c").exists()
