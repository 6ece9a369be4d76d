"""task=digits and model=mlp, and runs from Python."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.call import run
from experiments.config import MLP
from experiments.mlp import Mlp, odd, pretrained
from experiments.tasks import BadInput
from experiments.tasks.digits import Digits, Pixels

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FEW = ["model=mlp", "task=digits", "rank=4", "train.steps=2", "track.mode=disabled"]


def idx(folder: Path, count: int = 40, images: bytes | None = None) -> Path:
    """A small data set in MNIST's layout: image i is 2 x 3 pixels of brightness i, digit i % 10."""
    pixels = b"".join(bytes([i] * 6) for i in range(count)) if images is None else images
    head = struct.pack(">4I", 0x803, count, 2, 3)
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(head + pixels))
    digits = bytes(i % 10 for i in range(count))
    (folder / LABELS).write_bytes(struct.pack(">2I", 0x801, count) + digits)
    return folder


def test_parities_and_splits_have_no_image_in_common() -> None:
    even, odd_ = Digits().splits(), Digits(parity="odd").splits()
    parts = [{i.id for i in s.train + s.validation + s.test} for s in (even, odd_)]
    assert len(parts[0] & parts[1]) == 0 and len(parts[0] | parts[1]) == 1797
    assert [len(s) for s in (even.train, even.validation, even.test)] == [446, 223, 222]
    assert even.forgetting == odd_.validation
    counts = {item.response for item in even.train}
    assert counts == {"0-1", "2-3", "4-5", "6-7", "8-9"}


def test_idx_files_are_read(tmp_path: Path) -> None:
    splits = Digits(path=str(idx(tmp_path))).splits()
    assert [i.id for i in splits.train[:3]] == ["0", "2", "8"]
    (example,) = Digits().examples(splits.train[1:2], Pixels(), 784)
    assert example.ids == [2] * 6 and example.item.label == 1.0
    with pytest.raises(BadInput, match=r"train\.seq_len=5: less than the pixels"):
        Digits().examples(splits.train, Pixels(), 5)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda f: idx(f, images=b"\x01" * 7), "7 bytes where 240 should be"),
        (lambda f: (f / f"{IMAGES}.gz").write_bytes(b"no gzip"), "Not a gzipped file"),
        (lambda f: (f / LABELS).write_bytes(b"\0\0\x08\x03"), "no idx file of bytes in 1 dim"),
        (lambda f: (f / f"{IMAGES}.gz").unlink(), "no ...-images-idx3-ubyte"),
        (lambda f: (f / LABELS).unlink(), f"{LABELS}.*No such file"),
    ],
)
def test_broken_files_are_named(break_: object, message: str, tmp_path: Path) -> None:
    idx(tmp_path)
    break_(tmp_path)  # type: ignore[operator]
    with pytest.raises(BadInput, match=message):
        Digits(path=str(tmp_path)).splits()


def test_the_network_knows_odd_digits_and_is_the_same_each_time() -> None:
    node = MLP(path=None)
    model = pretrained(node)
    items = Digits(parity="odd").splits().validation
    pixels = torch.tensor([list(bytes.fromhex(i.prompt)) for i in items])
    hits = model(pixels).logits.argmax(1) == torch.tensor([i.label for i in items])
    assert hits.float().mean() > 0.9
    again = pretrained(node)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    again.first.weight.data.zero_()
    assert pretrained(node).first.weight.any()  # a copy was given out, not the one that is kept
    assert isinstance(model, Mlp) and model.first.weight.shape == (128, 8)


def test_the_components_are_the_principal_ones() -> None:
    model, (pixels, _) = pretrained(MLP(path=None)), odd(MLP(path=None))
    x = (pixels / 16).double()
    _, _, Vh = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    same = torch.from_numpy(Vh[:8]) @ model.components.double().mT
    assert torch.allclose(same.abs(), torch.eye(8, dtype=torch.float64), atol=1e-5)


def test_a_run_from_python_is_the_command_s(tmp_path: Path) -> None:
    words = [*FEW, "variant=pissa", f"out_dir={tmp_path}"]
    found = run(*words)
    assert found["metrics"]["primary"] == "accuracy" and found["params"]["head"] == 0
    assert found["params"]["trainable"] == 4 * (8 + 128) + 4 * (128 + 5)
    assert found["forgetting"]["base"]["accuracy"] > 0.9 > found["metrics"]["base"]["accuracy"]
    assert (Path(found["folder"]) / "result.json").is_file()
    assert run(*words) == found  # read, not run again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=skills"], "model=mlp: tells digits apart and nothing else"),
        (["model=tiny"], "task=digits: images are for model=mlp"),
        (["task.parity=prime"], r"task\.parity=prime: choices: even, odd"),
        (["model.components=65", "rank=2"], "an image has 64 pixels"),
        (["rank=9"], "its rank is at most 8"),
    ],
)
def test_what_does_not_fit_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(*FEW, *words, f"out_dir={tmp_path}")


def test_mnist(data: Path) -> None:
    splits = Digits(path=str(data / "mnist_t10k")).splits()
    assert len(splits.train) == 2464 and len(splits.train[0].prompt) == 2 * 784
