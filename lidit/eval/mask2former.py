"""Mask2Former (Cheng et al., 2022) of transformers with mmdet's pre- and post-processing, as GenEval runs it.

transformers' own post-processing differs: it resizes masks to 384 x 384, and from there by nearest pixels, and gives as
many instances as there are queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lidit.eval.suite import BenchmarkError

SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, for RGB from 0 to 255
PADDING = 128.0  # grey, before normalisation, as in mmdet's configs of instance models
MAX_PER_IMAGE = 100


@dataclass(frozen=True)
class Instances:
    """The instances that were found in an image, in no order.

    Args:
        labels: index of each instance's class.
        scores: scores in [0, 1]; 0 if the mask is empty.
        boxes: x1, y1, x2, y2 in pixels, x2 and y2 one past the mask's last pixel; zeros if the mask is empty.
        masks: masks at the image's size.
    """

    labels: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]
    boxes: Int[Tensor, "n 4"]
    masks: Bool[Tensor, "n h w"]


def instances(
    class_logits: Float[Tensor, "q classes"],
    mask_logits: Float[Tensor, "q padded_h padded_w"],
    img_shape: tuple[int, int],
    ori_shape: tuple[int, int],
    max_per_image: int = MAX_PER_IMAGE,
) -> Instances:
    """Instances from Mask2Former's outputs, by mmdet's rule.

    The best `max_per_image` of all pairs of query and class are taken, so one query can give several instances.

    Args:
        class_logits: class logits of each query; the last class is "no object".
        mask_logits: mask logits of each query, on the padded input's grid.
        img_shape: height and width of the input without its padding.
        ori_shape: height and width of the image before it was resized.
        max_per_image: largest number of pairs.
    """
    masks = mask_logits[:, : img_shape[0], : img_shape[1]]
    masks = F.interpolate(masks[:, None], ori_shape, mode="bilinear", align_corners=False)[:, 0]
    inside = masks > 0
    certainty = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    probabilities = class_logits.softmax(-1)[:, :-1]
    best, pairs = probabilities.flatten().topk(min(max_per_image, probabilities.numel()))
    queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
    return Instances(labels, best * certainty[queries], boxes_of(inside)[queries], inside[queries])


def boxes_of(masks: Bool[Tensor, "n h w"]) -> Int[Tensor, "n 4"]:
    """Tight boxes x1, y1, x2, y2 of masks, x2 and y2 exclusive; zeros for an empty mask."""
    rows, columns = masks.any(2).int(), masks.any(1).int()
    first = [columns.argmax(1), rows.argmax(1)]  # of several largest, argmax gives the first
    last = [side.shape[1] - side.flip(1).argmax(1) for side in (columns, rows)]
    return torch.stack([*first, *last], 1) * masks.any(2).any(1)[:, None]


def resized(height: int, width: int) -> tuple[int, int]:
    """The input's height and width without padding: the shorter side is 800, or less if the longer would pass 1333."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def pixels(image: UInt8[np.ndarray, "h w 3"]) -> tuple[Float[Tensor, "1 3 H W"], tuple[int, int]]:
    """The model's input, sides a multiple of 32, and its height and width without the padding right and below."""
    height, width = resized(*image.shape[:2])
    whole = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
    # OpenCV resizes uint8 without antialiasing, to whole numbers
    whole = F.interpolate(whole, (height, width), mode="bilinear", align_corners=False).round()
    whole = F.pad(whole, (0, -width % DIVISOR, 0, -height % DIVISOR), value=PADDING)
    return (whole - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None], (height, width)


class Mask2Former:
    """Mask2Former as a detector.

    Args:
        name: Hugging Face id or folder of a `Mask2FormerForUniversalSegmentation` for instances.
        classes: number of classes that the model must have.
        device: device to run on.

    Raises:
        BenchmarkError: the model cannot be loaded, lacks weights, or has another number of classes.
    """

    def __init__(self, name: str, classes: int, device: str = "cpu") -> None:
        self.device = device
        self._model = _load(name, classes).to(device)

    @torch.no_grad()
    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Instances:
        """The instances in an image, on the detector's device."""
        inputs, img_shape = pixels(image)
        outputs = self._model(pixel_values=inputs.to(self.device))
        masks = F.interpolate(outputs.masks_queries_logits, inputs.shape[2:], mode="bilinear", align_corners=False)
        return instances(outputs.class_queries_logits[0], masks[0], img_shape, (image.shape[0], image.shape[1]))


def network() -> type:
    """`Mask2FormerForUniversalSegmentation` without its training loss, for which transformers demands scipy."""
    from torch import nn
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerModel, Mask2FormerPreTrainedModel

    class Mask2FormerForInference(Mask2FormerForUniversalSegmentation):
        _keys_to_ignore_on_load_unexpected = [r"^criterion\."]

        def __init__(self, config) -> None:
            Mask2FormerPreTrainedModel.__init__(self, config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

    return Mask2FormerForInference


def _load(name: str, classes: int):
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "mask2former" or config.num_labels != classes:
            raise BenchmarkError(
                f"{name} is a {config.model_type} of {config.num_labels} classes; name a Mask2Former for instances of "
                f"{classes} classes, such as facebook/mask2former-swin-small-coco-instance"
            )
        model, report = network().from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(
            f"{name} cannot be loaded as a Mask2Former: {error}; name a Hugging Face id or a folder with config.json "
            "and weights"
        ) from error
    if report["missing_keys"]:
        raise BenchmarkError(f"{name} is not a whole Mask2Former: it lacks {min(report['missing_keys'])} and others")
    return model.eval()
