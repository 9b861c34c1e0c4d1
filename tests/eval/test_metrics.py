"""The scores are what their docstrings say, whatever their encoders' files are, and of all ranks together."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedTokenizerFast

from lidit.eval.metrics import CLIPIQA, FID, CLIPScore, Diversity, Outside, SigLIPScore, TimmFeatures, inception
from lidit.eval.openclip import OpenCLIP
from lidit.eval.suite import BenchmarkError

PROMPTS = ["a red circle", "two blue squares", "a green bench and a car"]
LONG = "a red circle to the left of a blue square and a green triangle below a yellow star"
CONTEXT = 12
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": CONTEXT, "width": 32, "heads": 2, "layers": 2}
CLIP = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 49408}}
SIGLIP = {
    "embed_dim": 16,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": VISION,
    "text_cfg": TEXT
    | {"vocab_size": 64, "no_causal_mask": True, "pool_type": "last", "hf_tokenizer_name": "beside/the-weights"},
}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def save(folder: Path, config: dict, preprocess: dict, seed: int) -> Path:
    """A model of random weights in open_clip's format, far enough from zero that its embeddings differ."""
    torch.manual_seed(seed)
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = kind(**{key: value for key, value in config.items() if key != "custom_text"})
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, pad 0 and a closing token 1 that a post-processor adds, as SigLIP's."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(" ".join([*PROMPTS, LONG]).split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "clip", CLIP, {}, seed=0)


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("models") / "siglip", SIGLIP, HALF, seed=1)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def clip(clip_folder: Path) -> OpenCLIP:
    return OpenCLIP(pretrained=str(clip_folder))


@pytest.fixture
def siglip(siglip_folder: Path) -> OpenCLIP:
    return OpenCLIP(pretrained=str(siglip_folder))


@pytest.fixture
def architecture(tmp_path: Path) -> str:
    """CLIP's config under a name, for files that bring none."""
    (tmp_path / "lidit-tiny-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "lidit-tiny-clip.json")
    return "lidit-tiny-clip"


def pictures(count: int = 3, size: tuple[int, int] = (40, 56), seed: int = 0) -> Tensor:
    """Smooth random images b 3 h w."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4)).astype(np.float32)
    fine = F.interpolate(torch.from_numpy(coarse), size, mode="bilinear")
    return fine.round().to(torch.uint8)


def by_hand(folder: Path, images: Tensor, prompts: list[str]) -> tuple[Tensor, nn.Module]:
    """100 cos of each pair by open_clip's own means, one by one."""
    name = f"local-dir:{folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    values = []
    with torch.no_grad():
        for image, prompt in zip(images, prompts, strict=True):
            picture = preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))[None]
            seen, read = model.eval().encode_image(picture)[0], model.encode_text(tokenizer([prompt]))[0]
            values.append(100 * (seen @ read) / seen.norm() / read.norm())
    return torch.stack(values), model


def test_clip_score_is_the_mean_of_100_cos(clip: OpenCLIP, clip_folder: Path) -> None:
    expected, _ = by_hand(clip_folder, pictures(), PROMPTS)
    metric = CLIPScore(clip)
    torch.testing.assert_close(metric.scores(pictures(), PROMPTS), expected, atol=1e-4, rtol=0)
    assert expected.std() > 1  # the pairs differ, so that a mix-up would show
    metric.update(pictures()[:1], PROMPTS[:1])
    metric.update(pictures()[1:], PROMPTS[1:])
    assert metric.compute().item() == pytest.approx(max(expected.mean().item(), 0), abs=1e-4)


def test_only_the_mean_is_kept_from_below_zero(clip: OpenCLIP) -> None:
    metric = CLIPScore(clip)
    texts = clip.texts(PROMPTS[:2])
    images = torch.stack([texts[0], -texts[1]])
    torch.testing.assert_close(metric.scores(images, texts), torch.tensor([100.0, -100.0]))
    metric.update(images, texts)
    assert metric.compute().item() == pytest.approx(0, abs=1e-4)  # 50 if each image were
    metric.update(-images[:1], texts[:1])
    assert metric.compute().item() == 0


def test_siglip_score_is_the_mean_cosine_and_may_be_negative(siglip: OpenCLIP, siglip_folder: Path) -> None:
    expected, model = by_hand(siglip_folder, pictures(), PROMPTS)
    assert model.visual.preprocess_cfg["resize_mode"] == "squash"
    metric = SigLIPScore(siglip)
    torch.testing.assert_close(metric.scores(pictures(), PROMPTS), expected, atol=1e-4, rtol=0)
    texts = siglip.texts(PROMPTS)
    metric.update(-texts, texts)
    assert metric.compute().item() == pytest.approx(-100, abs=1e-3)


def test_clip_iqa_is_the_softmax_of_100_cos(clip: OpenCLIP, clip_folder: Path) -> None:
    good, _ = by_hand(clip_folder, pictures(), ["Good photo."] * 3)
    bad, _ = by_hand(clip_folder, pictures(), ["Bad photo."] * 3)
    metric = CLIPIQA(clip)
    expected = torch.sigmoid(good - bad)
    torch.testing.assert_close(metric.scores(pictures()), expected, atol=1e-4, rtol=0)
    metric.update(pictures(), PROMPTS)  # prompts may come along
    assert metric.compute().item() == pytest.approx(expected.mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    "layout", [lambda b: b.permute(0, 2, 3, 1).numpy(), lambda b: list(b.permute(0, 2, 3, 1).numpy())]
)
def test_arrays_score_as_tensors_do(clip: OpenCLIP, layout: Callable) -> None:
    metric = CLIPScore(clip)
    assert torch.equal(metric.scores(layout(pictures()), PROMPTS), metric.scores(pictures(), PROMPTS))


def test_embeddings_serve_in_place_of_images_and_prompts_and_have_length_one(clip: OpenCLIP) -> None:
    images, texts = clip.images(pictures()), clip.texts(PROMPTS)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(3))
    metric = CLIPScore(clip)
    assert torch.equal(metric.scores(images, texts), metric.scores(pictures(), PROMPTS))
    assert torch.equal(CLIPIQA(clip).scores(images), CLIPIQA(clip).scores(pictures()))


def test_what_is_run_at_once_changes_nothing(clip: OpenCLIP, clip_folder: Path) -> None:
    small = OpenCLIP(pretrained=str(clip_folder), batch_size=2)
    torch.testing.assert_close(small.images(pictures()), clip.images(pictures()), atol=1e-5, rtol=0)
    torch.testing.assert_close(small.texts(PROMPTS), clip.texts(PROMPTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_long_prompt_keeps_its_end_and_is_counted_and_said_once(request: pytest.FixtureRequest, kind: str) -> None:
    encoder = request.getfixturevalue(kind)
    end = {"clip": 49407, "siglip": 1}[kind]
    with pytest.warns(UserWarning, match=f"cut to {CONTEXT}, and its end token stays"):
        ids = encoder.tokens([PROMPTS[0], LONG])
    assert ids.shape == (2, CONTEXT)
    assert ids[1, -1] == end
    assert end in ids[0]
    assert encoder.cut == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokens([LONG, LONG])
    assert encoder.cut == 3


def test_a_prompt_that_just_fits_is_not_cut(clip: OpenCLIP) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = clip.tokens([" ".join(["red"] * (CONTEXT - 2))])
    assert ids[0, -1] == 49407
    assert (ids[0] != 0).all()
    assert clip.cut == 0


def test_a_tokenizer_that_drops_the_end_is_put_right(clip_folder: Path, tmp_path: Path) -> None:
    """As torchmetrics' slicing of token ids would."""
    config = SIGLIP | {"text_cfg": SIGLIP["text_cfg"]}
    folder = save(tmp_path / "model", config, HALF, seed=2)
    word_tokenizer().save_pretrained(folder)
    encoder = OpenCLIP(pretrained=str(folder)).load()
    inner = encoder._tokenizer.tokenizer
    encoder._tokenizer.__class__ = type(
        "Slicing",
        (type(encoder._tokenizer),),
        {"__call__": lambda self, texts: torch.tensor([inner(t)["input_ids"][:CONTEXT] for t in texts])},
    )
    with pytest.warns(UserWarning, match="end token stays"):
        assert encoder.tokens([LONG])[0, -1] == 1


def test_siglip_text_is_padded_to_the_context_length(siglip: OpenCLIP) -> None:
    ids = siglip.tokens(["a red circle"])
    assert ids.shape == (1, CONTEXT)
    assert ids[0, 3:].tolist() == [1, *[0] * (CONTEXT - 4)]


def test_a_file_of_a_named_architecture_reads_as_the_folder_does(
    clip: OpenCLIP, clip_folder: Path, architecture: str
) -> None:
    encoder = OpenCLIP(architecture, str(clip_folder / "open_clip_model.safetensors"))
    assert torch.equal(encoder.images(pictures()), clip.images(pictures()))
    assert encoder.describe() == {"name": architecture, "pretrained": str(clip_folder / "open_clip_model.safetensors")}


def test_a_file_is_preprocessed_as_the_tags_of_its_architecture() -> None:
    """SigLIP's mean is not CLIP's, and the file does not say so."""
    from lidit.eval.openclip import _preprocessing

    siglip = _preprocessing("ViT-SO400M-14-SigLIP-384")
    assert siglip == {f"image_{key}": tuple(v) if isinstance(v, list) else v for key, v in HALF.items()}
    with pytest.raises(BenchmarkError, match="ViT-L-14 are preprocessed in different ways"):
        _preprocessing("ViT-L-14")


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-L-14-quickgelu", "opnai", "no tag of ViT-L-14-quickgelu; tags are: openai"),
        ("ViT-L-15", "openai", "no architecture ViT-L-15"),
        ("ViT-L-14", "openai", "trained with QuickGELU; name ViT-L-14-quickgelu"),
        ("ViT-L-14-quickgelu", "/nowhere/model.safetensors", "/nowhere/model.safetensors is no file"),
        ("ViT-L-14-quickgelu", "openai", "cannot load openai.*without a network, name a folder"),
        ("ViT-L-14-quickgelu", "hf-hub:nobody/nothing", "cannot load hf-hub:nobody/nothing"),
    ],
)
def test_what_cannot_be_had_is_said(name: str, pretrained: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        CLIPScore(OpenCLIP(name, pretrained)).update(pictures(), PROMPTS)


@pytest.mark.parametrize("lost", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_an_incomplete_folder_is_refused_not_filled_with_random_weights(
    clip_folder: Path, tmp_path: Path, lost: str
) -> None:
    shutil.copytree(clip_folder, tmp_path / "part")
    (tmp_path / "part" / lost).unlink()
    with pytest.raises(BenchmarkError, match="part: .*name a folder with open_clip_config.json"):
        OpenCLIP(pretrained=str(tmp_path / "part")).load()


def test_a_broken_file_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "part")
    (tmp_path / "part" / "open_clip_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(BenchmarkError, match="open_clip cannot load"):
        OpenCLIP(pretrained=str(tmp_path / "part")).load()


def test_the_kinds_are_not_mixed_up(clip: OpenCLIP, siglip: OpenCLIP) -> None:
    with pytest.raises(BenchmarkError, match="is a SigLIP; CLIPScore needs a CLIP"):
        CLIPScore(siglip).scores(pictures(), PROMPTS)
    with pytest.raises(BenchmarkError, match="is not a SigLIP; SigLIPScore needs one"):
        SigLIPScore(clip).scores(pictures(), PROMPTS)
    with pytest.raises(BenchmarkError, match="CLIPIQA needs a CLIP"):
        CLIPIQA(siglip).scores(pictures())


@pytest.mark.parametrize(
    "images",
    [pictures().float() / 255, pictures().permute(0, 2, 3, 1), pictures()[:, :1], pictures()[0], pictures()[:0]],
    ids=["float", "channels last", "grey", "one image", "none"],
)
def test_other_images_are_refused(clip: OpenCLIP, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 RGB images|no images"):
        clip.images(images)


def test_prompts_are_one_for_each_image_and_no_single_text(clip: OpenCLIP) -> None:
    with pytest.raises(ValueError, match="there are 3 and 2"):
        CLIPScore(clip).update(pictures(), PROMPTS[:2])
    with pytest.raises(ValueError, match="list of at least one prompt"):
        clip.texts("a red circle")
    with pytest.raises(ValueError, match="list of at least one prompt"):
        clip.texts([])


def test_loading_draws_no_random_numbers(clip_folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    OpenCLIP(pretrained=str(clip_folder)).load()
    assert torch.equal(torch.rand(3), expected)


def test_no_checkpoint_carries_an_encoder(clip: OpenCLIP) -> None:
    network = Pool()
    held = nn.ModuleList([CLIPScore(clip), CLIPIQA(clip), Diversity(network), FID(network)])
    held[0].update(pictures(), PROMPTS)
    assert not list(held.parameters())
    assert not held.state_dict()


def test_autocast_around_it_changes_nothing(clip: OpenCLIP) -> None:
    expected = clip.images(pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clip.images(pictures()), expected)


def test_a_recipe_names_encoder_and_score(clip_folder: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metric", type=Metric)
    encoder = {"class_path": "lidit.eval.openclip.OpenCLIP", "init_args": {"pretrained": str(clip_folder)}}
    metric = {"class_path": "lidit.eval.metrics.CLIPScore", "init_args": {"encoder": encoder}}
    made = parser.instantiate(parser.parse_object({"metric": metric})).metric
    assert made.encoder.pretrained == str(clip_folder)
    assert CLIPScore().encoder.describe() == {"name": "ViT-L-14-quickgelu", "pretrained": "openai"}
    assert SigLIPScore().encoder.describe() == {"name": "ViT-SO400M-14-SigLIP-384", "pretrained": "webli"}


class Pool(nn.Module):
    """Mean colours and a weight, as features."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 255 * self.weight


class Unread(OpenCLIP):
    """An encoder without a model, where embeddings are given."""

    sigmoid = False


def ready(kind: str) -> Metric:
    metrics = {"clip": lambda: CLIPScore(Unread()), "diversity": lambda: Diversity(Pool()), "fid": lambda: FID(Pool())}
    return metrics[kind]()


def feed(metric: Metric, kind: str, part: int) -> None:
    """One of two unequal parts of the data."""
    rows = slice(0, 4) if part == 0 else slice(4, 10)
    if kind == "clip":
        embeddings = F.normalize(torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
        embeddings[1] += embeddings[0]
        metric.update(embeddings[0, rows], embeddings[1, rows])
    elif kind == "diversity":
        metric.update(pictures(10)[rows], [f"prompt {i // 2}" for i in range(10)][rows])
    else:
        metric.update(pictures(10)[rows], real=True)
        metric.update(pictures(10, seed=1)[rows], real=False)


def rank_of_two(rank: int, folder: Path, empty: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = {}
    for kind in ("clip", "diversity", "fid"):
        metric = ready(kind)
        for part in (0, 1) if empty and rank == 0 else () if empty else (rank,):
            feed(metric, kind, part)
        values[kind] = metric.compute().item()
    torch.save(values, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("empty", [False, True], ids=["unequal shares", "one rank has nothing"])
def test_two_ranks_score_as_one(tmp_path: Path, empty: bool) -> None:
    processes = torch.multiprocessing.start_processes(
        rank_of_two, (tmp_path, empty), 2, join=False, start_method="fork"
    )
    while not processes.join(timeout=60):
        pass
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    for kind, value in first.items():
        alone = ready(kind)
        feed(alone, kind, 0)
        feed(alone, kind, 1)
        assert value == pytest.approx(alone.compute().item(), rel=1e-5), kind
        half = ready(kind)
        feed(half, kind, 0)
        assert value != pytest.approx(half.compute().item(), rel=1e-3), kind


def test_fid_is_the_distance_of_the_gaussians() -> None:
    real, drawn = pictures(50), pictures(60, seed=1) // 2
    metric = FID(Pool())
    metric.update(real[:20], real=True)
    metric.update(real[20:], real=True)
    metric.update(list(drawn.permute(0, 2, 3, 1).numpy()), real=False)
    with torch.no_grad():
        a, b = Pool()(real).double().numpy(), Pool()(drawn).double().numpy()
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="uint8 RGB images"):
        metric.update(real.float(), real=True)


def test_inception_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lidit.eval.metrics.find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match="pip install torch-fidelity, or pass features"):
        FID()
    with pytest.raises(BenchmarkError, match="torch-fidelity"):
        inception()


def test_diversity_is_the_mean_distance_of_pairs_within_a_prompt() -> None:
    images = pictures(5)
    prompts = ["a", "b", "a", "b", "a"]
    features = F.normalize(Pool()(images).detach(), dim=-1)
    distance = 1 - features @ features.T
    first, second = (distance[0, 2] + distance[0, 4] + distance[2, 4]) / 3, distance[1, 3]
    metric = Diversity(Pool())
    torch.testing.assert_close(metric.scores(images, prompts), torch.stack([first, second]), atol=1e-6, rtol=0)
    metric.update(images, prompts)
    assert metric.compute().item() == pytest.approx(((first + second) / 2).item(), abs=1e-6)
    with pytest.raises(ValueError, match="'c' has one"):
        metric.update(images, ["a", "a", "b", "b", "c"])
    with pytest.raises(ValueError, match="no images"):
        metric.update(images[:0], [])


@pytest.mark.parametrize("name", ["test_vit", "mobilenetv3_small_050"])
def test_timm_encoders_serve_as_features(name: str) -> None:
    torch.manual_seed(0)
    features = TimmFeatures(name, pretrained=False)
    found = features(pictures(2))
    assert found.shape == (2, features.num_features)
    assert not torch.allclose(found[0], found[1])
    metric = Diversity(features)
    metric.update(pictures(2), ["a", "a"])
    assert metric.compute() > 0
    assert FID(features).real_features_sum.shape == (features.num_features,)


def test_timm_images_are_squashed_and_normalised() -> None:
    features = TimmFeatures("test_vit", pretrained=False)
    seen = {}
    features.model.forward = lambda pixels: seen.setdefault("pixels", pixels).mean((2, 3))
    grey = torch.full((1, 3, 40, 56), 255, dtype=torch.uint8)
    grey[:, :, :, 28:] = 0
    features(grey)
    pixels = seen["pixels"] * features.std + features.mean
    assert pixels.shape[-2:] == features.size
    left, right = pixels[..., : features.size[1] // 2 - 4], pixels[..., features.size[1] // 2 + 4 :]
    torch.testing.assert_close(left, torch.ones_like(left), atol=0.02, rtol=0)  # both halves in full: nothing cropped
    torch.testing.assert_close(right, torch.zeros_like(right), atol=0.02, rtol=0)


def test_a_timm_folder_and_names_that_are_not() -> None:
    with pytest.raises(BenchmarkError, match="timm cannot give vit_colossal"):
        TimmFeatures("vit_colossal")
    with pytest.raises(BenchmarkError, match="timm cannot give test_vit.r160_in1k"):
        TimmFeatures("test_vit.r160_in1k")


def test_a_timm_folder_gives_its_weights(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    features = TimmFeatures(str(tmp_path))
    assert torch.equal(features.model.patch_embed.proj.weight, model.patch_embed.proj.weight)


def test_a_network_outside_comes_back_to_the_images_and_evaluates() -> None:
    network = Pool().train()
    outside = Outside(network)
    assert not network.training
    assert outside.num_features == 3
    outside.to(torch.float64)
    assert network.weight.dtype == torch.float32
