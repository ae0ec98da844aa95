"""Suites as data, the splits made from them, the metrics, and what the check says about bad data."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import datasets
import evaluate as hf_evaluate
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn import metrics as sk

from hubfusion.data import loading as corpora
from hubfusion.data.checks import find_contamination, inspect
from hubfusion.data.loading import Split, build_data, cut_validation, draw, load, resolve
from hubfusion.data.metrics import SuiteMetric, measure
from hubfusion.data.suite import Cut, Dataset, Family, Metric, Suite, load_suite, shipped_suites
from hubfusion.errors import EvaluationError
from hubfusion.evaluate.protocols import STANDARD, read_protocols
from hubfusion.evaluate.recommend import own_dataset
from hubfusion.train import Training
from tests.trainable_models import make_data, write_task

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "reference" / "recycling"


def table(**splits: list[tuple[str, int]]) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {
            n: datasets.Dataset.from_dict({"text": [t for t, _ in r], "label": [y for _, y in r]})
            for n, r in splits.items()
        }
    )


def numbered(n: int) -> Split:
    return Split(tuple(map(str, range(n))), None, tuple(range(n)))


def test_the_shipped_suites_load_and_recycling36_has_its_36_datasets():
    assert {"offline", "recycling36"} <= set(shipped_suites())
    suite = load_suite("recycling36")
    assert len(suite.datasets) == 36
    assert suite.representative == "mnli"
    families = {f: sum(d.family is f for d in suite.datasets) for f in Family}
    assert families == {
        Family.GENERAL: 10, Family.NLI: 6, Family.TWITTER: 6, Family.SENTIMENT: 7, Family.TOPIC: 7,
        Family.DIALOGUE: 0, Family.OTHER: 0,
    }  # fmt: skip
    assert {d.name for d in suite.datasets if d.noisy} == {
        *("wnli", "wsc", "copa", "cb", "anli", "poem_sentiment", "wic")
    }
    assert [d.name for d in suite.datasets if d.is_regression] == ["stsb"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not at hand")
def test_the_test_sizes_are_those_inferred_from_published_accuracies():
    with (PUBLISHED / "inferred_test_set_sizes.csv").open() as file:
        inferred = {r["dataset"]: r["inferred_test_n"] for r in csv.DictReader(file)}
    sizes = {d.name: str(d.test_size) for d in load_suite("recycling36").datasets}
    del inferred["stsb"], sizes["stsb"]  # no share of its test set
    assert sizes == inferred


def test_a_users_suite_is_read_from_toml_and_its_folders_are_beside_it(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\n[defaults]\ntest_cap = 7\n[[datasets]]\nname = "a"\nrepo = "./data"\ntest = "eval"\n'
    )
    suite = load_suite(tmp_path / "mine.toml")
    assert suite.get("a").repo == str(tmp_path / "data")
    assert (suite.get("a").test_cap, suite.get("a").test) == (7, "eval")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\ndatasets = []', "at least one dataset"),
        ('name = "x"\n[[datasets]]\nname = "a"\nrepo = "o/a"\ncolor = "red"', "unknown key 'color'"),
        ('name = "x"\n[[datasets]]\nname = "a"\nrepo = "o/a"\n[[datasets]]\nname = "a"\nrepo = "o/b"', "comes twice"),
        ('name = "x"\n[[datasets]]\nname = "a"\nrepo = "o/a"\nmetric = "bleu"', "must be one of accuracy"),
        ('name = "x"\n[[datasets]]\nname = "a"\nrepo = "o/a"\ntest = "train"', "also trained"),
        ("name = ", "not TOML"),
    ],
)
def test_a_wrong_suite_is_refused_with_the_reason(tmp_path, text, message):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        load_suite(tmp_path / "s.toml")


def test_an_unknown_suite_is_an_error_that_names_the_known_ones():
    with pytest.raises(EvaluationError, match="not one of offline, recycling36"):
        load_suite("glue")


@pytest.mark.parametrize(
    ("whole", "train"), [(250, 226), (400, 360), (554, 498), (635, 571), (2490, 2242), (9427, 8485), (67349, 66349)]
)
def test_the_edges_cut_gives_the_train_sizes_of_model_recycling(whole, train):
    """cb, copa, wsc, wnli, rte, boolq and sst2: train on the Hub, and the size in the authors' constants."""
    left, held_out = (rows.tolist() for rows in cut_validation(np.arange(whole), Cut.EDGES))
    assert len(left) == train
    assert sorted(left + held_out) == list(range(whole))
    assert left == list(range(left[0], left[-1] + 1))


@pytest.mark.parametrize(("whole", "held_out"), [(500, 50), (9999, 999), (50000, 1000)])
def test_the_tenth_cut_takes_a_tenth_or_a_thousand(whole, held_out):
    train, validation = (rows.tolist() for rows in cut_validation(np.arange(whole), Cut.TENTH))
    assert (len(validation), len(train)) == (held_out, whole - held_out)
    assert sorted(train + validation) == list(range(whole))
    assert (train, validation) == (sorted(train), sorted(validation))


def test_a_draw_is_the_same_for_every_model_and_another_for_every_seed():
    split = numbered(100)
    assert draw(split, 3, examples=10) == draw(split, 3, examples=10)
    assert draw(split, 3, examples=10) != draw(split, 4, examples=10)
    assert draw(split, 3) == list(range(100))
    assert len(draw(split, 3, examples=1000)) == 100


def test_a_draw_per_class_has_k_of_each_label_that_has_them():
    split = Split(("x",) * 60, None, (0,) * 40 + (1,) * 17 + (2,) * 3)
    labels = [split.labels[r] for r in draw(split, 0, per_class=5)]
    assert [labels.count(y) for y in (0, 1, 2)] == [5, 5, 3]


def test_labels_become_ids_in_the_order_of_their_names():
    rows = table(train=[("a", 10), ("b", 9), ("c", 2)], validation=[("d", 2)], test=[("e", 10)])
    data = build_data(Dataset("x", "o/x", validation="validation"), "0" * 40, rows)
    assert data.labels == ("2", "9", "10")
    assert (data.train.labels, data.test.labels) == ((2, 1, 0), (2,))


def test_class_names_are_kept_and_unlabeled_examples_are_dropped():
    rows = table(train=[("a", 0), ("b", 1)], validation=[("c", -1), ("d", 1)], test=[("e", 0)])
    rows = rows.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    data = build_data(Dataset("x", "o/x", validation="validation"), "0" * 40, rows)
    assert data.labels == ("no", "yes")
    assert data.validation.first == ("d",)


def test_pooled_splits_pairs_bins_and_numbers():
    rows = datasets.DatasetDict(
        {
            n: datasets.Dataset.from_dict({"p": [f"{n}1", f"{n}2"], "h": ["x", "y"], "w": ["z", None], "s": [0.1, 1.0]})
            for n in ("train_r1", "train_r2", "dev", "test")
        }
    )
    spec = Dataset("x", "o/x", ("p", "h", "w"), "s", train="train_r1+train_r2", validation="dev", bins=5)
    data = build_data(spec, "0" * 40, rows)
    assert data.train.first == ("train_r11", "train_r12", "train_r21", "train_r22")
    assert data.train.second == ("x z", "y ", "x z", "y ")
    assert data.labels == ("0", "5")  # int(5 * 1.0) is a class of its own
    number = build_data(replace(spec, bins=None, metric=Metric.SPEARMAN), "0" * 40, rows)
    assert (number.labels, number.test.labels) == ((), (0.1, 1.0))


def test_held_out_examples_are_not_trained_on():
    rows = table(train=[(str(i), i % 2) for i in range(50)])
    data = build_data(Dataset("x", "o/x", test="train", test_cap=10, hold_out=True), "0" * 40, rows)
    parts = [set(s.first) for s in (data.train, data.validation, data.test)]
    assert [len(p) for p in parts] == [36, 4, 10]
    assert len(set.union(*parts)) == 50


def drawn(rows: list[str], seed: int, size: int) -> tuple[list[str], list[str]]:
    """The rows without ``size`` drawn ones, and those, both in order: the documented draws, on a plain list."""
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    return [rows[i] for i in sorted(order[size:])], [rows[i] for i in sorted(order[:size])]


@pytest.mark.parametrize("batch", [3, 10_000])
def test_capped_rows_are_those_that_a_cap_after_reading_would_leave(batch, monkeypatch):
    monkeypatch.setattr(corpora, "BATCH", batch)
    labels = [(-1, 0, 1, 2)[i % 4] for i in range(200)]
    parts = {
        n: datasets.Dataset.from_dict({"text": [f"{n}{i}" for i in range(200)], "label": labels}).cast_column(
            "label", datasets.ClassLabel(names=["a", "b", "c"])
        )
        for n in "xy"
    }
    spec = Dataset("d", "o/d", train="x+y", test="x+y", hold_out=True, train_cap=50, validation_cap=9, test_cap=40)
    data = build_data(spec, "0" * 40, datasets.DatasetDict(parts))
    rows = [f"{n}{i}" for n in "xy" for i in range(200) if i % 4]
    train, test = drawn(rows, seed=36, size=40)
    train, validation = drawn(train, seed=0, size=26)
    assert data.test.first == tuple(test)
    assert data.train.first == tuple(drawn(train, seed=0, size=50)[1])
    assert data.validation.first == tuple(drawn(validation, seed=0, size=9)[1])
    for split in (data.train, data.validation, data.test):
        assert split.labels == tuple(int(t[1:]) % 4 - 1 for t in split.first)


def test_only_texts_within_the_cap_become_python_strings(monkeypatch):
    read = []
    monkeypatch.setattr(corpora, "str", lambda t: read.append(t) or t, raising=False)
    rows = table(train=[(f"a{i}", "yes") for i in range(5000)], test=[("b", "yes")])
    data = build_data(Dataset("d", "o/d", train_cap=7), "0" * 40, rows)
    assert len([t for t in read if t.startswith("a")]) == len(data.train) + len(data.validation) == 7 + 500


@pytest.mark.parametrize("labels", [[-1, 0, 1], ["-1", "0", "1"], [-1.0, 0.0, None]])
def test_minus_one_in_a_column_without_class_names_is_refused(labels):
    """In sets with the labels -1, 0, 1 it is a class, elsewhere it marks what has no label."""
    rows = table(train=[("a", 0), ("b", 1)], test=list(zip("cde", labels, strict=True)))
    with pytest.raises(EvaluationError, match=r"dataset d \(o/d\): 1 rows of 'test' are labeled -1 .* ClassLabel"):
        build_data(Dataset("d", "o/d", validation="train"), "0" * 40, rows)
    number = build_data(Dataset("d", "o/d", validation="train", metric=Metric.SPEARMAN), "0" * 40, rows)
    assert number.test.labels[0] == -1.0  # a number is not a class


def test_rows_without_a_label_are_left_out_and_a_split_of_them_is_empty():
    rows = table(train=[("a", 0.0), ("b", None), ("c", math.nan), ("d", 1.0)], test=[("e", 1.0)])
    data = build_data(
        Dataset("d", "o/d", validation="test", train="train", test="train+test", test_cap=3), "0" * 40, rows
    )
    assert (data.labels, data.test.first) == (("0.0", "1.0"), ("a", "d", "e"))
    hidden = table(train=[("a", 0), ("b", 1)], test=[("c", -1)])
    hidden = hidden.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    with pytest.raises(EvaluationError, match="the test split is empty: none of its 1 rows has a label"):
        build_data(Dataset("d", "o/d", validation="train"), "0" * 40, hidden)


@pytest.mark.parametrize(
    ("label", "change", "message"),
    [
        ([1, 2], {}, "column 'label' holds list"),
        ("high", {"bins": 5}, "label 'high' is not a number"),
        ("high", {"metric": Metric.SPEARMAN}, "label 'high' is not a number"),
    ],
)
def test_a_label_of_the_wrong_kind_is_named(label, change, message):
    rows = table(train=[("a", label)], test=[("b", label)])
    with pytest.raises(EvaluationError, match=message):
        build_data(replace(Dataset("d", "o/d", validation="train"), **change), "0" * 40, rows)


def test_a_class_id_without_a_name_is_refused():
    rows = table(train=[("a", 0), ("b", 1)], test=[("c", 1)])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no"])})
    rows = datasets.DatasetDict({n: datasets.Dataset(t.data, t.info, t.split) for n, t in rows.items()})
    for part in rows.values():
        part.info.features = features
    with pytest.raises(EvaluationError, match="class 1 in 'train', there are 1 names"):
        build_data(Dataset("d", "o/d", validation="train"), "0" * 40, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": "heldout"}, "no split 'heldout', there is train"),
        ({"label": "y"}, "no column 'y', there is text, label"),
    ],
)
def test_a_wrong_split_or_column_is_named(change, message):
    rows = table(train=[("a", 0)], validation=[("b", 1)], test=[("c", 0)])
    with pytest.raises(EvaluationError, match=message):
        build_data(replace(Dataset("x", "o/x", validation="validation"), **change), "0" * 40, rows)


def test_a_local_folder_is_pinned_by_its_content(tmp_path):
    spec = write_task(tmp_path / "mood", make_data())
    data = load(spec)
    assert data.sha == resolve(spec) and len(data.sha) == 40
    assert data.train.first == make_data().train.first
    (tmp_path / "mood" / "test.jsonl").open("a").write('{"text": "good", "label": 1}\n')
    assert resolve(spec) != data.sha


def test_an_own_csv_holds_out_a_fifth(tmp_path):
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(50)))
    data = load(own_dataset(tmp_path / "own.csv"))
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 10)


def test_what_does_not_change_the_numbers_does_not_change_the_key():
    spec = Dataset("x", "o/x")
    assert spec.key("a") == replace(spec, note="why", family=Family.NLI, noisy=True).key("a")
    assert len({spec.key("a"), spec.key("b"), replace(spec, test_cap=5).key("a")}) == 3


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        (Metric.ACCURACY, sk.accuracy_score),
        (Metric.MACRO_F1, lambda y, p: sk.f1_score(y, p, average="macro")),
        (Metric.MATTHEWS, sk.matthews_corrcoef),
    ],
)
def test_class_metrics_are_those_of_scikit_learn(metric, reference):
    rng = np.random.default_rng(0)
    for _ in range(3):
        truth, guess = rng.integers(4, size=(2, 57))
        assert measure(metric, guess.tolist(), truth.tolist()) == pytest.approx(reference(truth, guess), abs=1e-12)


def test_spearman_is_that_of_scipy_with_and_without_ties():
    rng = np.random.default_rng(1)
    for decimals in (0, 5):
        truth, guess = np.round(rng.normal(size=(2, 40)), decimals)
        assert measure(Metric.SPEARMAN, guess.tolist(), truth.tolist()) == pytest.approx(
            spearmanr(guess, truth).statistic
        )


def test_hand_computed_metrics():
    assert measure(Metric.ACCURACY, [1, 0, 1, 1], [1, 0, 0, 1]) == 0.75
    assert measure(Metric.MACRO_F1, [1, 0, 1, 1], [1, 0, 0, 1]) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert measure(Metric.SPEARMAN, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert measure(Metric.SPEARMAN, [1.0, 1.0, 1.0], [3.0, 2.0, 1.0]) == 0.0


@pytest.mark.parametrize("metric", list(Metric))
def test_every_metric_is_an_offline_metric_of_evaluate(metric, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = SuiteMetric(config_name=metric.value)
    assert isinstance(module, hf_evaluate.Metric)
    found = module.compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2])
    assert found[metric.value] == pytest.approx(measure(metric, [0, 1, 1, 2], [0, 1, 2, 2]))


def test_one_prediction_too_few_is_refused():
    with pytest.raises(EvaluationError, match="got 1 for 2"):
        measure(Metric.ACCURACY, [1], [1, 0])


def test_the_check_counts_repeated_contradicted_and_leaked_texts():
    spec = Dataset("x", "o/x", validation="validation", test_size=3)
    rows = table(
        train=[("Good dog", 1), ("good  DOG", 1), ("good dog", 0), ("cat", 0)],
        validation=[("tree", 1)],
        test=[("GOOD dog", 1), ("tree", 1), ("house", 0), ("", 1)],
    )
    report = inspect(build_data(spec, "0" * 40, rows))
    assert (report.train, report.test, report.labels) == (4, 4, 2)
    assert (report.repeated, report.contradicted, report.leaked) == (2, 1, 2)
    assert report.problems == (
        "the test set has 4 examples, the published one 3",
        "2 of 4 test texts are in train or validation",
        "1 training texts come again with another label",
        "1 test texts are empty",
    )


def test_a_substitute_is_held_to_its_own_size():
    rows = table(train=[("a", 0), ("b", 1)], validation=[("c", 0)], test=[("d", 1), ("e", 0)])
    spec = Dataset("x", "o/x", validation="validation", test_size=3, own_test_size=2)
    assert inspect(build_data(spec, "0" * 40, rows)).problems == ()
    wrong = inspect(build_data(replace(spec, own_test_size=5), "0" * 40, rows)).problems
    assert wrong == ("the test set has 2 examples, this substitute's 5",)
    assert spec.key("a") == replace(spec, own_test_size=None).key("a")


def test_sound_data_has_no_problems():
    rows = table(train=[("a", 0), ("b", 1)], validation=[("c", 0)], test=[("d", 1), ("e", 1), ("f", 0), ("g", 0)])
    report = inspect(build_data(Dataset("x", "o/x", validation="validation"), "0" * 40, rows))
    assert report.problems == ()
    assert report.majority == 50.0


def test_test_texts_in_the_training_data_of_another_dataset_are_named():
    a = Split(("one", "two", "three"), None, (0, 0, 0))
    b = Split(("Two", "three", "four"), None, (0, 0, 0))
    found = find_contamination({"a": a, "b": b}, {"b": b, "c": Split(("three",), None, (1,))})
    assert [(f.test, f.train, f.count) for f in found] == [("a", "b", 2), ("a", "c", 1), ("b", "c", 1)]


def test_the_finetune_recipe_is_the_papers():
    recipe = STANDARD["finetune"].training
    assert (recipe.learning_rate, recipe.batch_size, recipe.epochs, recipe.max_length) == (5e-5, 256, 10, 250)
    assert (recipe.warmup, recipe.weight_decay, recipe.epsilon) == (0.0006, 0.01, 0.001)
    assert (recipe.validate_every, recipe.patience) == (12_800, 256_000)
    assert STANDARD["few-shot"].examples == 100


def test_protocols_start_from_a_standard_one_and_say_what_is_wrong(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('[finetune]\nexamples = 64\ntraining = { epochs = 2 }\n[mine]\nlike = "few-shot"\nper_class = 8\n')
    found = read_protocols(path)
    assert found["finetune"].training == Training(epochs=2)
    assert (found["mine"].examples, found["mine"].per_class) == (None, 8)
    assert found["finetune"].hash != STANDARD["finetune"].hash
    for text, message in (
        ("[mine]\nexamples = 3", "protocol 'mine': allowed are"),
        ("[finetune]\ntraining = { epochs = 0 }", "epochs must be above 0"),
        ("[finetune]\nexample = 3", "unknown key 'example'"),
    ):
        path.write_text(text)
        with pytest.raises(EvaluationError, match=message):
            read_protocols(path)


def test_the_hash_is_of_the_recipe_and_not_of_its_name_or_seed():
    one = STANDARD["finetune"]
    same = replace(one, name="other", datasets=("x",), training=replace(one.training, seed=7))
    assert same.hash == one.hash
    assert replace(one, training=replace(one.training, epochs=9)).hash != one.hash


def test_a_suite_can_be_cut_down():
    suite = Suite("s", (Dataset("a", "o/a"), Dataset("b", "o/b")))
    assert [d.name for d in suite.only(["b"]).datasets] == ["b"]
    with pytest.raises(EvaluationError, match="no c, there is a, b"):
        suite.only(["c"])
