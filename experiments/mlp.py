"""The network of PiSSA's Figure 2a (arXiv:2404.02948), pretrained when it is asked for.

Official script: GraphPKU/PiSSA, loss_landscape/main.py: the first eight principal components of an
image, 128 hidden units, five outputs, no biases; 200 steps of Adam on all odd digits. Differences:
pixels are scaled to 0..1 here, the components are those of the odd training images, and the
learning rate is one at which 200 steps suffice.
"""

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from .config import MLP
from .tasks import BadInput
from .tasks.digits import CLASSES, Digits

LR = 1e-2  # of pretraining


class MlpConfig(transformers.PreTrainedConfig):
    """Sizes."""

    model_type = "lab-mlp"

    def __init__(self, pixels: int = 64, components: int = 8, hidden: int = 128, **more: Any):
        super().__init__(**more, num_labels=len(CLASSES))  # pyright: ignore[reportCallIssue]
        self.pixels, self.components, self.hidden = pixels, components, hidden


class Mlp(transformers.PreTrainedModel):
    """second(relu(first(P (x / top - mean)))): P [components, pixels] is fixed, the rest is linear.

    `input_ids` [batch, pixels] are brightnesses; `top` is the brightest there is.
    """

    config_class = MlpConfig  # type: ignore[assignment]
    mean: Tensor
    components: Tensor
    top: Tensor

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.pixels))
        self.register_buffer("components", torch.zeros(config.components, config.pixels))
        self.register_buffer("top", torch.ones(()))
        self.first = nn.Linear(config.components, config.hidden, bias=False)
        self.second = nn.Linear(config.hidden, len(CLASSES), bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        if input_ids.shape[1] != self.mean.shape[0]:
            raise BadInput(f"model=mlp: made for {len(self.mean)} pixels, not {input_ids.shape[1]}")
        x = (input_ids.to(self.mean.dtype) / self.top - self.mean) @ self.components.mT
        logits = self.second(F.relu(self.first(x)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.long())
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def odd(node: MLP) -> tuple[Tensor, Tensor]:
    """Pixels [images, pixels] and classes [images] of the odd digits that are for training."""
    items = Digits(path=node.path, parity="odd").splits().train
    if not items:
        raise BadInput(f"model.path={node.path}: no odd digits there")
    pixels = torch.tensor([list(bytes.fromhex(item.prompt)) for item in items])
    return pixels, torch.tensor([item.label for item in items]).long()


def digest(node: MLP) -> str:
    """A hash of sizes, seed and data, which make the weights."""
    plain = {k: v for k, v in asdict(node).items() if k != "path"}
    data = Digits(path=node.path, parity="odd").splits().digest()
    return hashlib.sha256(json.dumps([plain, LR, data], sort_keys=True).encode()).hexdigest()


def sized(node: MLP, pixels: int = 64) -> MlpConfig:
    """Its sizes; more components than pixels are refused."""
    if node.components > pixels:
        raise BadInput(f"model.components={node.components}: an image has {pixels} pixels")
    return MlpConfig(pixels, node.components, node.hidden)


def pretrained(node: MLP) -> Mlp:
    """The network after its steps on odd digits, made once a process.

    Trained in float64 and rounded once, so that the number of threads does not show.
    """
    known = digest(node)
    if known not in _made:
        _made[known] = _pretrain(node)
    return deepcopy(_made[known])


_made: dict[str, Mlp] = {}


def _pretrain(node: MLP) -> Mlp:
    pixels, classes = odd(node)
    model = Mlp(sized(node, pixels.shape[1])).double()
    model.top.copy_(pixels.max())
    x = pixels / model.top
    model.mean.copy_(x.mean(0))
    _, vectors = torch.linalg.eigh((x - model.mean).mT @ (x - model.mean))
    axes = vectors.flip(1)[:, : node.components].mT  # the largest first
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    model.components.copy_(axes * largest.sign())  # an eigenvector's sign is anyone's
    generator = torch.Generator().manual_seed(node.seed)
    for layer in (model.first, model.second):
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    optimizer = torch.optim.Adam([model.first.weight, model.second.weight], lr=LR)
    for _ in range(node.steps):
        optimizer.zero_grad()
        model(pixels, labels=classes).loss.backward()
        optimizer.step()
    model.zero_grad()
    return model.float()
