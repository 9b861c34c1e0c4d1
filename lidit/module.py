"""LI-DiT as a LightningModule: images and prompts become latents and features, and the objective makes the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lidit.checkpoint import check_llms, check_shapes, shapes
from lidit.data.datamodule import Batch
from lidit.draws import Draws, SampleDraws
from lidit.lightning_private import batches_done, has_trainer, share
from lidit.models.chat import ReadAhead
from lidit.models.contracts import (
    Features,
    KeysValues,
    Measured,
    Objective,
    Text,
    check_backbone,
    check_encoder,
    check_objective,
)
from lidit.models.llm import FrozenLLM
from lidit.models.vae import FrozenVAE
from lidit.parallel import Parallel, agree_on_statistics, load_in_turn, share_llms
from lidit.training.optimizers import adamw, muon
from lidit.training.train_loss import TrainLoss


def freeze(model: nn.Module, trained: list[str] | None) -> None:
    """Train only the weights whose names contain an entry of `trained`, or all weights if it is None.

    Raises:
        ValueError: an entry is in no weight's name.
    """
    names = [name for name, _ in model.named_parameters()]
    for part in trained or []:
        if not any(part in name for name in names):
            raise ValueError(f"model.trained names {part!r}, which is in no weight's name; one name is {names[0]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or any(part in name for part in trained))


class TextToImage(LightningModule):
    """A text-to-image diffusion model: frozen LLMs and VAE, a trained prompt encoder and backbone.

    The frozen models are held outside the module tree: no checkpoint, EMA copy or shard holds them.
    `lidit/models/contracts.py` describes what each part must have.

    Args:
        llms: the frozen LLMs that read the prompt, in the order of the prompt encoder's branches.
        vae: the frozen autoencoder.
        prompt_encoder: makes the prompt encoder (features to text) from the LLMs' widths and the backbone's width.
        backbone: makes the backbone (noisy latent, time and text to prediction) from the latent's channels.
        objective: what the model predicts and how it is trained.
        learning_rate: peak learning rate.
        weight_decay: weight decay of matrices; vectors have none. UNSTATED: the paper does not say which weights decay.
        betas: AdamW's betas. UNSTATED: the paper gives none.
        optimizer: adamw, as in the paper, or muon for the matrices that modules name by a method `hidden_matrices`; see
            `lidit/training/optimizers.py`.
        trained: the weights to train, by parts of their names, such as prompt_encoder; null trains all.
        warmup_steps: number of steps over which the learning rate rises linearly.
        cosine: after the warm-up, let the learning rate decay to zero at trainer.max_steps; False keeps the
            peak, as the paper does.

    Raises:
        ValueError: the objective breaks its contract.
    """

    def __init__(
        self,
        llms: list[FrozenLLM],
        vae: FrozenVAE,
        prompt_encoder: Callable[[list[int], int], nn.Module],
        backbone: Callable[[int], nn.Module],
        objective: Objective,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup_steps: int = 1000,
        cosine: bool = False,
        optimizer: Literal["adamw", "muon"] = "adamw",
        trained: list[str] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        check_objective(objective)
        self.llms, self.vae, self.objective = llms, vae, objective
        self.make_prompt_encoder, self.make_backbone = prompt_encoder, backbone
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup_steps, self.cosine, self.optimizer, self.trained = warmup_steps, cosine, optimizer, trained
        self.prompt_encoder: nn.Module | None = None
        self.backbone: nn.Module | None = None
        self.parallel = Parallel()  # `lidit fit` sets the recipe's
        self._seed: int | None = None  # read from the checkpoint of a run that is resumed

    def encode_prompts(self, prompts: list[str]) -> list[Features]:
        """Each frozen LLM's features of the prompts, as the prompt encoder reads them."""
        return [llm.load(self.device)(prompts) for llm in self.llms]

    def predict(self, x_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], features: list[Features]) -> Tensor:
        """The backbone's prediction (b c h w); the refiners' gates read the time, so text is encoded for every t."""
        return self.backbone(x_t, t, self.prompt_encoder(features, t))

    def predictor(self, features: list[Features]) -> Callable[[Tensor, Tensor], Tensor]:
        """A `predict` bound to these prompts, for sampling. A text that does not depend on time is encoded once."""
        if not self.prompt_encoder.timeless:
            return lambda x_t, t: self.predict(x_t, t, features)

        @cache
        def text() -> tuple[Text, dict[str, KeysValues]]:
            text = self.prompt_encoder(features, torch.zeros(len(features[0][0]), device=self.device))
            keys_values = getattr(self.backbone, "keys_values", None)
            return text, {"keys_values": keys_values(text)} if keys_values else {}

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            once, keys_values = text()
            return self.backbone(x_t, t, once, **keys_values)

        return predict

    def loss(self, batch: Batch, generator: Draws = None) -> tuple[Tensor, Tensor]:
        """The loss of each sample (b), and the times (b) at which it was measured."""
        latent = batch.latent if batch.latent is not None else self.vae.load(self.device).encode(batch.image)
        if batch.ahead is not None:
            batch.ahead.give([llm.prompts for llm in self.llms])
        features = batch.features if batch.features is not None else self._encode_together(batch.prompt)
        if batch.longest is not None:
            features = [Measured.of(each, longest) for each, longest in zip(features, batch.longest, strict=True)]
        if hasattr(self.prompt_encoder, "draws"):  # it adds noise in training
            self.prompt_encoder.draws = generator
        return self.objective.loss(lambda x_t, t: self.predict(x_t, t, features), latent, generator)

    def _encode_together(self, prompts: list[str]) -> list[Features]:
        """As `encode_prompts`, but called by all ranks: the ranks of a node load the LLMs one after another."""
        if has_trainer(self) and not all(llm.loaded for llm in self.llms):
            load_in_turn(self.llms, self.device, self.trainer.local_rank, self.trainer.num_devices)
        return self.encode_prompts(prompts)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The mean loss, the loss of each sample (b), and the times (b) at which it was measured."""
        loss, t = self.loss(batch, self._draws(batch))
        return {"loss": loss.mean(), "losses": loss.detach(), "times": t}

    def configure_callbacks(self) -> list[Callback]:
        """The callback that logs `train/loss`."""
        return [TrainLoss()]

    def _draws(self, batch: Batch) -> SampleDraws:
        """Noise and times of each sample; the run's seed and the sample's number in the run decide them.

        The number follows from that of the batches before, so a resumed run goes on exactly.
        """
        return SampleDraws([self.seed], self._first(batch, batches_done(self.trainer)))

    def _first(self, batch: Batch, batches: int) -> int:
        """The number of this rank's first sample, after so many global batches like this one."""
        rank, world = share(self.trainer)
        return (batches * world + rank) * (len(batch.key) - batch.lent + len(batch.skipped))

    @property
    def seed(self) -> int:
        """The seed of the run's noise and times; a resumed run keeps the seed it began with."""
        return torch.initial_seed() if self._seed is None else self._seed

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss at the same noise and times in every validation, for any number of ranks."""
        self._evaluate(batch, batch_idx, "val/loss")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss on the test shards, measured as in validation."""
        self._evaluate(batch, batch_idx, "test/loss")

    def _evaluate(self, batch: Batch, batch_idx: int, name: str) -> None:
        loss, _ = self.loss(batch, SampleDraws([batch_idx], self._first(batch, 0)))
        self.log(name, loss.mean(), prog_bar=True, sync_dist=True, batch_size=len(loss))

    def configure_optimizers(self) -> dict:
        """The chosen optimizer, and the schedule of its learning rate.

        Raises:
            ValueError: the optimizer is muon, and no module names matrices for it.
        """
        make = {"adamw": adamw, "muon": muon}[self.optimizer]
        optimizer = make(self, self.learning_rate, self.betas, self.weight_decay)
        # a plain function, because LambdaLR would save the attributes of a bound method
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """The learning rate at a step, as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if not self.cosine:
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.trainer.max_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def build(self) -> tuple[nn.Module, nn.Module]:
        """The backbone and the prompt encoder, with new weights.

        Raises:
            ValueError: one of them breaks its contract.
        """
        backbone = self.make_backbone(self.vae.channels)
        check_backbone(backbone)
        encoder = self.make_prompt_encoder([llm.width for llm in self.llms], backbone.width)
        check_encoder(encoder)
        return backbone, encoder

    def configure_model(self) -> None:
        """Build the backbone and the prompt encoder, which parsing a recipe does not do.

        Raises:
            ValueError: `trained` names no weight.
        """
        if self.backbone is None:
            self._hold(*self.build())

    def _hold(self, backbone: nn.Module, prompt_encoder: nn.Module) -> None:
        self.backbone, self.prompt_encoder = backbone, prompt_encoder
        freeze(self, self.trained)
        self.parallel.apply(self.backbone)

    def adopt(self, weights: dict[str, Tensor], source: str) -> None:
        """Take the weights of a model of the same architecture, and build from them what is not built yet.

        Args:
            weights: weights and buffers, by their names in a checkpoint.
            source: where the weights came from, named in the error.

        Raises:
            ValueError: a tensor is missing, left over or of another shape.
        """
        self.check_weights(weights, source)
        if self.backbone is not None:
            self.load_state_dict(weights)
            return
        held = self.skeleton()
        types = {name: tensor.dtype for name, tensor in held.state_dict().items()}
        held.load_state_dict({name: weight.to(types[name]) for name, weight in weights.items()}, assign=True)
        ours = all(type(part).__module__.startswith("lidit.") for part in held.values())
        if not ours or any(buffer.is_meta for buffer in held.buffers()):
            # what a constructor computes or ties, no checkpoint has
            backbone, prompt_encoder = self.build()
            held = nn.ModuleDict({"backbone": backbone, "prompt_encoder": prompt_encoder})
            held.load_state_dict(weights)
        self._hold(held["backbone"], held["prompt_encoder"])

    def setup(self, stage: str) -> None:
        """Refuse caches that were made with other frozen models; let the data's workers tokenise captions."""
        if (data := self.trainer.datamodule) is not None:
            data.expect(vae=self.vae.identity, llms=[llm.identity for llm in self.llms])
            data.read_ahead = partial(ReadAhead, [llm.prompts for llm in self.llms])

    def on_fit_start(self) -> None:
        agree_on_statistics(self.prompt_encoder)
        share_llms(self.llms)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["llms"] = [llm.identity for llm in self.llms]
        checkpoint["seed"] = self.seed
        checkpoint["precision"] = self.trainer.precision
        checkpoint["sizes"] = self.trainer.datamodule.sizes if self.trainer.datamodule is not None else []

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        check_llms(checkpoint.get("llms", []), self.llms, "the checkpoint")
        if "state_dict" in checkpoint:  # a sharded checkpoint has its weights elsewhere
            self.check_weights(checkpoint["state_dict"], "the checkpoint")
        self._seed = checkpoint.get("seed")

    def check_weights(self, weights: dict[str, Tensor], source: str) -> None:
        """Refuse weights that do not fit the model exactly.

        Raises:
            ValueError: a tensor is missing, left over or of another shape.
        """
        check_shapes({name: tuple(weight.shape) for name, weight in weights.items()}, self.shapes(), source)

    def check_checkpoint(self, path: Path) -> None:
        """Refuse a checkpoint before any of its weights is read.

        Raises:
            ValueError: the checkpoint is incomplete, or its weights do not fit exactly.
        """
        check_shapes(shapes(path), self.shapes(), str(path))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight and buffer by name, whether the model has been built or not."""
        return {name: tuple(weight.shape) for name, weight in self.skeleton().state_dict().items()}

    def skeleton(self) -> nn.ModuleDict:
        """Backbone and prompt encoder on the meta device, with the names of checkpoints: shapes that take no memory."""
        with torch.device("meta"):
            backbone, prompt_encoder = self.build()
        return nn.ModuleDict({"backbone": backbone, "prompt_encoder": prompt_encoder})
