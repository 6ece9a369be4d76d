"""Small random models of many architectures, and what goes into them."""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
                   "tie_word_embeddings": False}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 24,
           "num_experts_per_tok": 2}  # fmt: skip


class Picture(nn.Module):
    """Two convolutions, one of them in groups, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 12, (1, 3), groups=2, bias=False)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.second(F.silu(self.first(x)))
        y = self.norm(h.mean((2, 3)))
        return y if labels is None else {"loss": F.cross_entropy(y, labels)}


def causal(kind: str, **sizes: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes)
    )


def gpt2(**more: Any) -> Any:
    return causal("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **more)


def llama(**more: Any) -> Any:
    return causal("llama", **SMALL | more)


def bert(kind: str = "bert") -> Any:
    settings = transformers.AutoConfig.for_model(kind, **SMALL, num_labels=3, pad_token_id=0)
    return transformers.AutoModelForSequenceClassification.from_config(settings)


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2,
                              num_heads=4, feed_forward_proj="gated-gelu",
                              decoder_start_token_id=0)
    )  # fmt: skip


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                               intermediate_size=48, image_size=16, patch_size=8)
    )  # fmt: skip


IDS = {"input_ids": 1 + torch.arange(24).view(2, 12) % 63}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (lambda: causal("llama", **GROUPED), IDS),
    "mistral": (lambda: causal("mistral", **GROUPED), IDS),
    "qwen3": (lambda: causal("qwen3", **GROUPED), IDS),
    "gemma": (lambda: causal("gemma", **GROUPED), IDS),
    "phi3": (lambda: causal("phi3", **GROUPED), IDS),
    "gpt2": (lambda: gpt2(tie_word_embeddings=False), IDS),
    "bert": (bert, IDS),
    "roberta": (lambda: bert("roberta"), IDS),
    "t5": (t5, IDS | {"decoder_input_ids": IDS["input_ids"]}),
    "mixtral": (lambda: causal("mixtral", **GROUPED, **MIXTURE), IDS),
    "qwen3_moe": (lambda: causal("qwen3_moe", **GROUPED, **MIXTURE), IDS),
    "vit": (vit, {"pixel_values": PIXELS}),
    "picture": (Picture, {"x": PIXELS[..., :11]}),
}


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, always with the same numbers, and its inputs; the global generator is left alone."""
    make, inputs = MODELS[name]
    return seeded(make), inputs


def seeded(make: Callable[..., Any], **more: Any) -> Any:
    """A model of `make`, always with the same numbers."""
    return deepcopy(_first(make, *more.items()))


@lru_cache(16)
def _first(make: Callable[..., Any], *more: tuple[str, Any]) -> Any:
    """That one, which is copied: to make it takes longer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(**dict(more)).eval()


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def labelled(inputs: dict[str, Any], outputs: Tensor) -> dict[str, Any]:
    """The inputs with labels that fit such outputs: the tokens themselves, or classes."""
    if outputs.ndim == 3:
        return inputs | {"labels": inputs["input_ids"]}
    return inputs | {"labels": torch.arange(len(outputs)) % 2}
