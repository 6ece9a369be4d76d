"""Models and tokenizers: the embedded one, any of transformers, or one of a given size.

A model is described first (its hash and width, without loading it), then loaded.
"""

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from variants._targets import HEADS

from .coded import is_coded, load_coded
from .config import HF, MLP, Config, Tiny
from .network import online
from .tasks import BadInput

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TINY = Path(__file__).parent / "tiny"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True)
class Source:
    """A model that is not loaded yet."""

    node: Tiny | HF | Config | MLP

    @property
    def name(self) -> str:
        """For tables."""
        if isinstance(self.node, HF):
            return Path(str(self.node.path)).name
        return self.node.kind

    @cached_property
    def folder(self) -> Path | None:
        """Where its files lie; None: it is built from sizes."""
        if isinstance(self.node, Config | MLP):
            return None
        if isinstance(self.node, Tiny):
            return TINY
        if not self.node.path:
            raise BadInput("model.path: model=hf needs a folder or a name on the hub")
        path = Path(self.node.path).expanduser()
        if path.is_dir():
            _refuse_broken(path)
            return path
        return _from_hub(self.node)

    @cached_property
    def digest(self) -> str:
        """A hash of weights, configuration and tokenizer, or of the sizes and the seed."""
        if isinstance(self.node, MLP):
            from .mlp import digest as of_data

            return of_data(self.node)
        if self.folder is None:
            return hashlib.sha256(json.dumps(vars(self.node), sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            if file.suffix in (".safetensors", ".json", ".model", ".txt"):
                digest.update(file.name.encode())
                with file.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def width(self) -> int | None:
        """The hidden size, or None where the model has no such number."""
        if isinstance(self.node, Config):
            return self.node.hidden_size
        if isinstance(self.node, MLP):
            return self.node.hidden
        settings = json.loads((self.folder / "config.json").read_text())  # type: ignore[operator]
        settings |= settings.get("text_config") or {}
        return next((settings[k] for k in WIDTH_KEYS if isinstance(settings.get(k), int)), None)

    def meta(self, num_labels: int = 0) -> Any:
        """The model without weights, for counting."""
        import transformers

        if isinstance(self.node, MLP):
            from .mlp import Mlp, sized

            with torch.device("meta"):
                return Mlp(sized(self.node))
        if isinstance(self.node, Config):
            settings: Any = _sizes(self.node, _tokenizer(self.node.tokenizer), num_labels)
        else:
            trust = isinstance(self.node, HF) and self.node.trust_remote_code
            settings = transformers.AutoConfig.from_pretrained(
                str(self.folder), trust_remote_code=trust, local_files_only=True
            )
        cls: Any = transformers.AutoModelForCausalLM
        if num_labels:
            cls = transformers.AutoModelForSequenceClassification
        with torch.device("meta"):
            return cls.from_config(settings)

    def load(self, num_labels: int = 0, regression: bool = False) -> "Loaded":
        """The model in eval mode with its tokenizer; with `num_labels`, a sequence classifier.

        A head that the files lack is drawn from torch's global generator.
        """
        if isinstance(self.node, MLP):
            return _images(self.node, num_labels)
        if isinstance(self.node, Config):
            model, tokenizer = _build(self.node, num_labels)
            fresh = bool(num_labels)
        else:
            model, tokenizer, fresh = _load(self.folder, self.node, num_labels)  # type: ignore[arg-type]
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise BadInput(f"model.path: the tokenizer of {self.name} has no pad and no eos token")
        model.config.pad_token_id = tokenizer.pad_token_id
        if regression:
            model.config.problem_type = "regression"
        head = None if num_labels else output_head(model.eval())
        return Loaded(model.eval(), tokenizer, fresh_head=fresh, output_head=head)


@dataclass
class Loaded:
    """A model, its tokenizer, and whether its head is new."""

    model: Any  # an nn.Module of transformers
    tokenizer: Any
    fresh_head: bool
    output_head: str | None = None  # the path of a causal model's, see `output_head`

    @property
    def heads(self) -> list[str]:
        """The top modules of a classifier's head: trained in full beside the adapter."""
        return [name for name, _ in self.model.named_children() if name in HEADS]

    @property
    def positions(self) -> int:
        """The longest sequence that the model takes."""
        return getattr(self.model.config, "max_position_embeddings", None) or 1 << 30


@torch.no_grad()
def output_head(model: Any) -> str | None:
    """The path of a causal model's output head, where the logits are what that gives and nothing
    else; None where the model does something to them (a cap, a scale), as a trial shows."""
    head = model.get_output_embeddings()
    paths = [path for path, module in model.named_modules() if module is head]
    marks: list[torch.Tensor] = []

    def mark(module: Any, args: Any, out: Any) -> torch.Tensor:
        marks.append(torch.zeros(out.shape[:-1], device=out.device))
        return marks[-1]

    if not paths:
        return None
    hook = head.register_forward_hook(mark)
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        logits = model(input_ids=ids).logits
    finally:
        hook.remove()
    plain = len(marks) == 1 and logits is marks[0] and logits.shape == ids.shape
    return paths[0] if plain else None


def _images(node: MLP, num_labels: int) -> "Loaded":
    from .mlp import pretrained
    from .tasks.digits import CLASSES, Pixels

    if num_labels != len(CLASSES):
        raise BadInput("model=mlp: tells digits apart and nothing else; its task is task=digits")
    model: Any = pretrained(node)
    model.to(DTYPES[node.dtype])
    return Loaded(model.eval(), Pixels(), fresh_head=False)


def _refuse_broken(folder: Path) -> None:
    """Names a folder without a model, and a weight file that was cut short."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"model.path={folder}: no config.json there, so no model of transformers")
    try:
        settings = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise BadInput(f"model.path={folder}: config.json is not json ({error})") from None
    if not isinstance(settings, dict):
        raise BadInput(f"model.path={folder}: config.json is no json object")
    for file in folder.glob("*.safetensors"):
        size = file.stat().st_size
        with file.open("rb") as handle:
            head = handle.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            try:
                tensors = json.loads(handle.read(length)) if 8 + length <= size else None
            except ValueError:
                tensors = None
        ends = [t["data_offsets"][1] for k, t in (tensors or {}).items() if k != "__metadata__"]
        if tensors is None or 8 + length + max(ends, default=0) > size:
            raise BadInput(f"model.path={folder}: {file.name} is truncated, or no safetensors file")


def _from_hub(node: HF) -> Path:
    """The snapshot of a hub name: from the cache, or fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name = str(node.path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadInput(f"model.path={name}: no such folder")
    try:
        return Path(
            snapshot_download(
                name,
                revision=node.revision,
                local_files_only=not hub_is_online(),
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"],
            )
        )
    except (OSError, ValueError, HFValidationError) as error:
        why = str(error).strip().splitlines()[0]
        why = f" ({type(error).__name__}: {why})" if hub_is_online() else ", which is not reached"
        raise BadInput(
            f"model.path={name}: no such folder, and nothing of that name from the hub{why}"
        ) from None


def hub_is_online() -> bool:
    """Whether the hub may be asked, and answers."""
    allowed = os.environ.get("HF_HUB_OFFLINE", "") in ("", "0")
    return allowed and online(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def _load(folder: Path, node: Tiny | HF, num_labels: int) -> tuple[Any, Any, bool]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    trust = isinstance(node, HF) and node.trust_remote_code
    settings = {"dtype": DTYPES[node.dtype], "trust_remote_code": trust, "local_files_only": True}
    if num_labels:
        cls: Any = transformers.AutoModelForSequenceClassification
        settings["num_labels"] = num_labels
    else:
        cls = _causal_class(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise BadInput(f"model.path={folder}: no tokenizer there ({', '.join(TOKENIZERS)})")
    coded = is_coded(folder)
    try:
        load = partial(load_coded, cls) if coded else cls.from_pretrained
        model, info = load(folder, output_loading_info=True, **settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise BadInput(f"model.path={folder}: {type(error).__name__}: {why}") from None
    missing = sorted(str(key) for key in info["missing_keys"])
    fresh = [key for key in missing if key.split(".")[0] in HEADS]
    if num_labels == 0 and missing:
        raise BadInput(
            f"model.path={folder}: the files lack {len(missing)} tensors of a "
            f"{type(model).__name__}, the first is {missing[0]}"
        )
    return model, tokenizer, bool(fresh)


def _causal_class(folder: Path) -> Any:
    """The class that config.json names, or the automatic one, whose tables take long to import."""
    import transformers

    named = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    if named[0].endswith(("ForCausalLM", "LMHeadModel")) and hasattr(transformers, named[0]):
        return getattr(transformers, named[0])
    return transformers.AutoModelForCausalLM


def _build(node: Config, num_labels: int) -> tuple[Any, Any]:
    import transformers

    tokenizer = _tokenizer(node.tokenizer)
    settings = _sizes(node, tokenizer, num_labels)
    cls: Any = transformers.AutoModelForCausalLM
    if num_labels:
        cls = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(node.seed)
        return cls.from_config(settings, dtype=DTYPES[node.dtype]), tokenizer


def _sizes(node: Config, tokenizer: Any, num_labels: int) -> Any:
    """A Llama of the size asked for."""
    import transformers

    _refuse_sizes(node, len(tokenizer))
    cls: Any = transformers.LlamaConfig
    return cls(
        hidden_size=node.hidden_size,
        num_hidden_layers=node.layers,
        num_attention_heads=node.heads,
        num_key_value_heads=node.kv_heads or node.heads,
        intermediate_size=node.intermediate_size or 4 * node.hidden_size,
        vocab_size=node.vocab_size or len(tokenizer),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=num_labels or 2,
        dtype=DTYPES[node.dtype],
    )


def _refuse_sizes(node: Config, tokens: int) -> None:
    if node.hidden_size % (2 * node.heads):  # positions turn pairs of numbers
        raise BadInput(
            f"model.hidden_size={node.hidden_size}: a multiple of 2 x {node.heads} heads"
        )
    if node.kv_heads is not None and node.heads % node.kv_heads:
        raise BadInput(f"model.kv_heads={node.kv_heads}: does not divide model.heads={node.heads}")
    if node.vocab_size is not None and node.vocab_size < tokens:
        raise BadInput(f"model.vocab_size={node.vocab_size}: the tokenizer has {tokens} tokens")


def _tokenizer(folder: str | None) -> Any:
    """The tokenizer of a folder, or one token a byte."""
    import transformers

    if folder is not None:
        path = Path(folder).expanduser()
        if not (path / "tokenizer.json").is_file():
            raise BadInput(f"model.tokenizer={folder}: no tokenizer.json there")
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), eos_token="<|endoftext|>"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
