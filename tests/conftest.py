"""Real models of a few thousand random parameters, saved as transformers and diffusers save them; no network."""

from __future__ import annotations

import os

# before the first import of torch or transformers: the tests share two cores, and may not ask the hub for anything
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a tokenizer used before a fork would warn in every child

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# A fake tensor makes torch believe in a CUDA device. If the first backward pass of a process comes after that, torch
# starts a thread for the device, and processes that are forked later cannot train.
if not torch.cuda.is_available():
    torch.ones(1, requires_grad=True).backward()
# shapes and types of every call are checked; as an option of pytest it would come after the conftests of subfolders,
# which import lidit, when a subfolder is tested alone
if not os.environ.get("LIDIT_UNCHECKED"):
    install_import_hook("lidit", "beartype.beartype")

SENTENCES = ["a red circle to the left of a blue square", "Describe the image by detailing the color and shape:"]
# Llama 3's manner: a beginning-of-text token, roles between header tokens, turns stripped and closed by <|eot_id|>
LLAMA_SPECIALS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}"
    "<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n{{ turn.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen's manner (ChatML): no beginning-of-text token, a system turn of its own unless one is given
QWEN_SPECIALS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
QWEN_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama of 4 blocks and width 32, with a tokenizer and a chat template in the manner of Llama 3."""
    tokenizer = byte_tokenizer(LLAMA_SPECIALS, LLAMA_TEMPLATE, bos=LLAMA_SPECIALS[0])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny_sizes(32, tokenizer), rope_parameters={"rope_theta": 5e5}))
    return saved(model, tokenizer, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen2 of 4 blocks and width 48, with a tokenizer and a chat template in the manner of Qwen."""
    tokenizer = byte_tokenizer(QWEN_SPECIALS, QWEN_TEMPLATE, bos=None)
    torch.manual_seed(1)
    return saved(Qwen2ForCausalLM(Qwen2Config(**tiny_sizes(48, tokenizer))), tokenizer, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a T5 of 4 blocks and width 32, whose tokenizer closes a text and knows a sentinel."""
    tokenizer = byte_tokenizer(["<pad>", "</s>", "<extra_id_0>"], "", bos=None)
    torch.manual_seed(3)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", decoder_start_token_id=0, **sizes)
    return saved(T5ForConditionalGeneration(config), tokenizer, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an AutoencoderKL: 8x down, 4 latent channels, scale and shift unlike 1 and 0."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.1,
        sample_size=64,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no model and reaches none."""

    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("lidit.models.source.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def byte_tokenizer(specials: list[str], template: str, bos: str | None) -> PreTrainedTokenizerFast:
    """A fast byte-level BPE tokenizer; the first special token pads, the second ends a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=specials[1],
        pad_token=specials[0],
        additional_special_tokens=specials[2:],
    )
    fast.chat_template = template
    return fast


def tiny_sizes(width: int, tokenizer: PreTrainedTokenizerFast) -> dict:
    """Config of a causal LLM of 4 blocks."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """The folder, with model and tokenizer in it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_llama: Path, tiny_qwen: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for `lidit fit`: both tiny LLMs, every part of LI-DiT, on 16 images of 32x32 px that make one batch.

    It logs beside itself for `tiny_checkpoint` alone; another test that trains by it names a `save_dir` of its own.
    """
    from data_prep.shard import shard

    folder = tmp_path_factory.mktemp("fit")
    shard(str(folder / "shards"), count=16, sizes=("32x32",), shard_size=16, workers=1)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder / "logs")}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    steps = {"max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    recipe = {
        "seed_everything": 0,
        "model": {
            "llms": [{"name": str(name), "dtype": "float32"} for name in (tiny_llama, tiny_qwen)],
            "vae": {"name": str(tiny_vae)},
            "prompt_encoder": class_("lidit.models.prompt_encoder.PromptEncoder", heads=2, mlp_ratio=2.0, whiten=True),
            "backbone": class_("lidit.models.lidit.LIDiT", depth=2, width=32, heads=2),
            "objective": class_("lidit.objectives.RectifiedFlow", base_size=4),
            "learning_rate": 1e-2,
            "warmup_steps": 2,
        },
        "data": {"train": str(folder / "shards"), "val": str(folder / "shards"), "batch_size": 16},
        "trainer": {
            **steps,
            **quiet,
            "accelerator": "cpu",
            "max_steps": 6,
            "gradient_clip_val": 1.0,
            "logger": logger,
            "callbacks": [
                class_("lidit.callbacks.ema.EMA", decay=0.9),
                class_(
                    "lightning.pytorch.callbacks.ModelCheckpoint",
                    dirpath=str(folder / "checkpoints"),
                    filename="{step}",
                    every_n_train_steps=1,
                    save_top_k=-1,
                ),
            ],
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_recipe: Path) -> Path:
    """Checkpoint of that recipe after its 6 steps, beside those of every step; the logs are in ../logs."""
    from lidit.cli import main

    assert main(["fit", "--config", str(tiny_recipe)]) == 0
    return tiny_recipe.parent / "checkpoints" / "step=6.ckpt"


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint as a folder of `lidit export`."""
    from lidit.export import export

    folder = tmp_path_factory.mktemp("export") / "model"
    export(str(tiny_checkpoint), str(folder))
    return folder


def class_(path: str, **arguments: object) -> dict:
    """How a recipe names a class and its arguments."""
    return {"class_path": path, "init_args": arguments}
