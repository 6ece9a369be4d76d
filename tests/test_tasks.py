"""Tasks: items, splits, tokens, scores."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.pretrain import make_tokenizer
from experiments.tasks import BadInput, Item, tasks
from experiments.tasks._scores import classification, regression
from experiments.tasks._task import IGNORED, cut, final_number, pairs, token_ids
from experiments.tasks.choice import Choice
from experiments.tasks.classify import Classify
from experiments.tasks.gsm8k import GSM8K
from experiments.tasks.jsonl import Jsonl
from experiments.tasks.lm import LanguageModelling


class Letters:
    """A tokenizer of one token a letter; 1 begins, 2 ends."""

    eos_token_id = 2

    def __call__(self, text: Any, add_special_tokens: bool = True, **more: Any) -> Any:
        found = type("Tokens", (), {})()
        ids = [[1] * add_special_tokens + [ord(c) for c in t]
               for t in ([text] if isinstance(text, str) else text)]  # fmt: skip
        found.input_ids = ids[0] if isinstance(text, str) else ids
        found.offset_mapping = [(i, i + 1) for i in range(len(text))]
        return found

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_loss_is_on_the_response_alone() -> None:
    (example,) = pairs([Item("0", "ab")], ["cd"], Letters(), 16)
    assert example.ids == [1, *map(ord, "abcd"), 2]
    assert example.labels == [IGNORED] * 3 + [ord("c"), ord("d"), 2] and not example.cut


def test_long_items_lose_the_beginning_of_the_prompt() -> None:
    (example,) = pairs([Item("0", "a" * 50 + "z")], ["cd"], Letters(), 8)
    assert len(example.ids) == 8 and example.cut
    assert example.ids[-4:] == [ord("z"), ord("c"), ord("d"), 2]
    (example,) = pairs([Item("0", "ab")], ["c" * 50], Letters(), 8)
    assert len(example.ids) == 8 and example.cut and example.labels[1] != IGNORED


def test_tokens_are_the_texts_alone_whatever_the_tokenizer_file_asks() -> None:
    tokenizer = make_tokenizer()
    texts = ["<copy>abcdef=", "<copy>abc="]
    plain = token_ids(tokenizer, texts)
    assert [len(ids) for ids in plain] == [8, 5]
    tokenizer.backend_tokenizer.enable_padding(direction="left", pad_id=0, pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert token_ids(tokenizer, texts) == plain


def test_what_is_missing_is_cut_from_train_and_stays_the_same() -> None:
    items = [Item(str(i), "", "") for i in range(100)]
    splits = cut(items, None, None)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [80, 10, 10]
    ids = [{i.id for i in s} for s in (splits.train, splits.validation, splits.test)]
    assert len(ids[0] | ids[1] | ids[2]) == 100
    assert cut(items, None, None) == splits
    many = cut([Item(str(i), "", "") for i in range(20000)], None, items)
    assert len(many.validation) == 500 and many.test == items
    with pytest.raises(BadInput, match="too few items"):
        cut(items[:5], None, None)


def test_lm_predicts_each_token_once(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "t.txt").write_text(text)
    task = LanguageModelling(path=str(tmp_path / "t.txt"))
    splits = task.splits()
    assert [len(s[0].response) for s in (splits.train, splits.validation, splits.test)] == [
        900, 50, 50
    ]  # fmt: skip
    examples = task.examples(splits.train, Letters(), 64)
    assert "".join(e.item.response for e in examples) == text[1:900]
    assert sum(len(e.ids) - 1 for e in examples) == 899
    predictions = [((len(e.ids) - 1) * math.log(2), len(e.ids) - 1) for e in examples]
    found = task.metrics([e.item for e in examples], predictions)
    assert found["perplexity"] == pytest.approx(2) and found["bits_per_byte"] == pytest.approx(1)


def test_jsonl_template_and_errors(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "id": f"n{i}"} for i in range(30)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    splits = Jsonl(path=str(file), template="<{prompt}>").splits()
    item = splits.train[0]
    assert item.prompt == f"<p{item.id[1:]}>" and item.response == f"r{item.id[1:]}"
    assert Jsonl().metrics([Item("0", "", "a b"), Item("1", "", "c")], [" a b\n", "d"]) == {
        "exact_match": 0.5
    }
    for template in ("{q}", "{prompt.q}", "{prompt[q]}", "{", "{0}"):
        with pytest.raises(
            BadInput, match=r"task\.template=.*cannot be filled.*; its keys: prompt"
        ):
            Jsonl(path=str(file), template=template).splits()
    file.write_text(json.dumps({"question": "x"}))
    with pytest.raises(BadInput, match="no key 'response' in a row; its keys: question"):
        Jsonl(path=str(file)).splits()
    file.write_text("{")
    with pytest.raises(BadInput, match="not json"):
        Jsonl(path=str(file)).splits()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no training file in this folder; looked for train\.jsonl"):
        Jsonl(path=str(tmp_path / "empty")).splits()


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        (Jsonl, "train.jsonl", '{"prompt": "x", "response": null}', "'response' is null in a row"),
        (GSM8K, "train.jsonl", '{"question": ["x"], "answer": "1"}', "'question' is .* not a text"),
        (Choice, "train.json", '[{"instruction": {}, "answer": 1, "output": 2}]', "'instruction'"),
        (Choice, "train.json", '[{"instruction": 1, "answer": 2, "output": 3}]', "answer '2'"),
        (Classify, "train.tsv", "sentence\tlabel\nshort\n", "'label' is null in a row, not a text"),
        (Classify, "train.tsv", "text\ty\na\tb\tc\n", "no key 'sentence' .* keys: text, y"),
    ],
)  # fmt: skip
def test_values_that_are_no_text(
    task: type, name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=rf"task\.path={tmp_path}/{name}: .*{message}"):
        task(path=str(tmp_path)).splits()


def test_a_number_of_json_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": 1, "answer": 2}\n' * 30)
    assert GSM8K(path=str(tmp_path)).splits().train[0].response == "2"


@pytest.mark.parametrize(
    ("text", "number"),
    [("x #### 1,234", 1234), ("#### -2.5 apples", -2.5), ("so 3 and then 4.", 4),
     ("none", None), ("#### none, but 7 before", 7), ("17 #### ", 17)],
)  # fmt: skip
def test_final_number(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_real_data_are_read(data: Path) -> None:
    maths = GSM8K(path=str(data / "gsm8k"))
    splits = maths.splits()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6973, 500, 1319)
    truth = splits.test[:5]
    assert maths.metrics(truth, [i.response for i in truth]) == {"exact_match": 1.0}
    book = Choice(path=str(data / "commonsense" / "openbookqa")).splits()
    assert len(book.test) == 500 and all(i.response in i.choices for i in book.test)
    assert {len(i.choices) for i in book.test} == {4}
    easy = Choice(path=str(data / "commonsense" / "ARC-Easy")).splits()
    assert len(easy.test) == 2376
    films = Classify(path=str(data / "glue" / "SST-2"))
    splits = films.splits()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (66849, 872, 500)
    assert films.labels == ["0", "1"]


def test_classify_reads_csv_pairs_and_numbers(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text("a,b,score\n" + "\n".join(f'"x, {i}",y{i},{i / 7}' for i in range(30)))
    task = Classify(path=str(file), text="a", pair="b", label="score", regression=True)
    splits = task.splits()
    assert task.num_labels == 1 and task.primary == "pearson"
    assert splits.train[0].prompt.startswith("x, ") and "\ny" in splits.train[0].prompt
    with pytest.raises(BadInput, match="no key 'sentence' in a row; its keys: a, b, score"):
        Classify(path=str(file), label="score").splits()
    file.write_text("sentence,label\n" + "\n".join(f"t{i},nan" for i in range(30)))
    with pytest.raises(BadInput, match="label 'nan' is not a number"):
        Classify(path=str(file), regression=True).splits()
    file.write_text("sentence,label\n" + "\n".join(f"t{i},yes" for i in range(30)))
    with pytest.raises(BadInput, match="one class only, 'yes'"):
        Classify(path=str(file)).splits()


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_equals_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="the extra `dev` brings it")
    generator = np.random.default_rng(0)
    labels = [str(i) for i in range(classes)]
    for _ in range(20):
        truth = [str(i) for i in generator.integers(0, classes, 50)]
        found = [t if generator.random() < 0.6 else str(generator.integers(0, classes))
                 for t in truth]  # fmt: skip
        own = classification(truth, found, labels)
        how = {"average": "binary", "pos_label": "1"} if classes == 2 else {"average": "macro"}
        assert own["accuracy"] == pytest.approx(metrics.accuracy_score(truth, found))
        assert own["precision"] == pytest.approx(metrics.precision_score(truth, found, **how))
        assert own["recall"] == pytest.approx(metrics.recall_score(truth, found, **how))
        assert own["f1"] == pytest.approx(metrics.f1_score(truth, found, **how))
        assert own["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, found))
    assert classification(["0", "1"], ["0", "0"], labels[:2])["precision"] == 0.0


def test_regression_equals_scipy() -> None:
    from scipy import stats

    generator = np.random.default_rng(0)
    truth = generator.integers(0, 6, 60).astype(float)  # with ties
    found = truth + generator.normal(size=60).round(1)
    own = regression(truth, found)
    assert own["pearson"] == pytest.approx(stats.pearsonr(truth, found)[0])
    assert own["spearman"] == pytest.approx(stats.spearmanr(truth, found)[0])
    assert own["mse"] == pytest.approx(float(((truth - found) ** 2).mean()))
    assert regression(truth, np.ones(60))["pearson"] == 0.0


def test_every_task_is_listed() -> None:
    assert {"skills", "lm", "jsonl", "gsm8k", "choice", "classify"} <= set(tasks())
