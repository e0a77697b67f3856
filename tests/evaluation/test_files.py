"""Every format and layout of a file gives the report of the same arrays, and whatever is wrong with a file is one sentence."""

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prediction_files import CLASSES, NAMES, answers, columns, predictions, write

from moe_posterior.cli import main
from moe_posterior.evaluation import evaluate

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FAST = ("--resamples", "100")
LISTS = ("--weights", "gate", "--experts", "expert_probs", "--groups", "country")
WIDE = ("--weights", "gate_", "--experts", "expert_", "--groups", "country")
MEASURED = (
    "arms",
    "subsets",
    "records",
    "paired",
    "configurations",
    "calibrators",
    "action",
    "subgroups",
    "rce",
    "online",
)


def run(tmp_path: Path, *words: object) -> dict[str, Any]:
    out = tmp_path / "out"
    assert main(["evaluate", "--predictions", *map(str, words), *FAST, "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["evaluate", "--predictions", *map(str, words), *FAST]) == 2
    return capsys.readouterr().err


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in MEASURED:
        assert found.get(key) == expected.get(key), key


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return evaluate(**predictions(), resamples=100).to_dict()  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.npz", "saved"])
def test_every_format_and_layout_gives_the_report_of_the_arrays(
    tmp_path: Path, expected: dict[str, Any], name: str, lists: bool
) -> None:
    if lists and ".csv" in name:
        pytest.skip("CSV has no lists")
    if name == "saved":
        pytest.importorskip("datasets")
    path = write(tmp_path / name, columns(predictions(), lists=lists))
    require_same(run(tmp_path, path, *(LISTS if lists else WIDE)), expected)


def test_pieces_of_any_size_give_the_same_report(tmp_path: Path, expected: dict[str, Any]) -> None:
    content = columns(predictions(), lists=True)
    for size in (1, 7, 1000):
        path = write(tmp_path / "a.parquet", content, row_group_size=size)
        require_same(run(tmp_path, path, *LISTS), expected)


def test_shards_are_one_set(tmp_path: Path, expected: dict[str, Any]) -> None:
    content = columns(predictions(), lists=True)
    for shard, rows in enumerate((slice(0, 100), slice(100, 300))):
        part = {name: values[rows] for name, values in content.items()}
        write(tmp_path / "all" / f"test-{shard:05d}-of-00002.parquet", part)
    require_same(run(tmp_path, tmp_path / "all", *LISTS), expected)


def test_labels_may_be_names_that_end_the_columns_or_that_the_user_gives(
    tmp_path: Path, expected: dict[str, Any]
) -> None:
    named = write(tmp_path / "named.csv", columns(predictions(), lists=False, named=True))
    require_same(run(tmp_path, named, *WIDE), expected)
    content = columns(predictions(), lists=True)
    content["label"] = columns(predictions(), lists=True, named=True)["label"]
    listed = write(tmp_path / "listed.jsonl", content)
    require_same(run(tmp_path, listed, *LISTS, "--class-names", *NAMES), expected)


def test_columns_numbered_from_one_mean_labels_from_one(tmp_path: Path) -> None:
    content = columns(predictions(), lists=False)
    plain = run(tmp_path, write(tmp_path / "a.csv", content))
    moved = {f"prob_{k + 1}": content[f"prob_{k}"] for k in range(CLASSES)}
    moved["label"] = [one + 1 for one in content["label"]]
    require_same(run(tmp_path, write(tmp_path / "b.csv", moved)), plain)


def test_classes_of_ten_or_more_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    target = draw.integers(0, 12, 100)
    probs = np.where(np.arange(12) == target[:, None], 0.45, 0.05)
    content = {f"p_{k}": probs[:, k] for k in sorted(range(12), key=str)} | {"y": target}
    report = run(tmp_path, write(tmp_path / "a.parquet", content))
    assert report["records"][0]["value"] == 1.0


def test_logits_are_taken_for_such_only_if_the_user_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = predictions()
    logits = np.log(found["probs"])
    path = write(tmp_path / "a.parquet", {"logits": logits.tolist(), "label": found["target"]})
    assert "--logits" in refused(capsys, path)
    assert "--logits" in refused(capsys, path, "--probs", "logits")
    report = run(tmp_path, path, "--logits")
    plain = evaluate(found["probs"], found["target"], resamples=100).to_dict()
    assert [one["value"] for one in report["records"]] == pytest.approx([one["value"] for one in plain["records"]])


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl", "a.npz"])
def test_two_columns_are_enough(tmp_path: Path, name: str) -> None:
    confidence, correct = answers()
    path = write(tmp_path / name, {"confidence": confidence.tolist(), "correct": correct.tolist()})
    require_same(run(tmp_path, path), evaluate(confidence=confidence, correct=correct, resamples=100).to_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("point", [".", ","])
def test_spreadsheets_may_separate_by_semicolons_or_tabs(tmp_path: Path, separator: str, point: str) -> None:
    confidence, correct = answers()
    lines = [f"{c:.3f}".replace(".", point) + f"{separator}{r}" for c, r in zip(confidence, correct, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join([f"confidence{separator}correct", *lines]))
    expected = evaluate(confidence=confidence.round(3), correct=correct, resamples=100).to_dict()
    require_same(run(tmp_path, tmp_path / "a.csv"), expected)  # type: ignore[arg-type]


def test_answers_beside_labels_stand_for_their_correctness(tmp_path: Path) -> None:
    confidence, correct = answers()
    said = ["yes" if right else "no" for right in correct]
    path = write(tmp_path / "a.csv", {"conf": confidence, "prediction": said, "label": ["yes"] * len(said)})
    require_same(run(tmp_path, path), evaluate(confidence=confidence, correct=correct, resamples=100).to_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_answers_that_a_gap_once_made_floats_still_match_their_labels(tmp_path: Path, name: str) -> None:
    confidence, correct = answers()
    columns = {"conf": confidence, "prediction": [float(right) for right in correct], "label": [1] * len(correct)}
    path = write(tmp_path / name, columns)
    require_same(run(tmp_path, path), evaluate(confidence=confidence, correct=correct, resamples=100).to_dict())  # type: ignore[arg-type]


def test_several_files_are_shifts_and_a_column_says_the_same(tmp_path: Path) -> None:
    sets = {"clean": predictions(200, 1), "fog": predictions(150, 2), "rain": predictions(120, 3)}
    files = [write(tmp_path / "in" / f"{name}.parquet", columns(one, lists=True)) for name, one in sets.items()]
    several = run(tmp_path, *files)
    assert several["records"][0]["shift"] == "clean"
    assert {one["shift"] for one in several["records"]} == {"clean", "fog", "rain", "all shifts"}
    require_same(run(tmp_path, tmp_path / "in"), several)
    together: dict[str, list] = {"domain": []}
    for name, one in sets.items():
        for key, values in columns(one, lists=True).items():
            together.setdefault(key, []).extend(values)
        together["domain"] += [name] * len(one["target"])
    require_same(run(tmp_path, write(tmp_path / "all.parquet", together), "--shift", "domain"), several)


def test_models_side_by_side_come_from_files_or_from_a_column(tmp_path: Path) -> None:
    found = predictions()
    probs = {"old": found["probs"], "new": 0.5 * found["probs"] + 0.5 / CLASSES}
    words = [
        f"{name}={write(tmp_path / f'{name}.parquet', {'probs': one.tolist(), 'label': found['target']})}"
        for name, one in probs.items()
    ]
    expected = evaluate(probs["old"], found["target"], models={"new": probs["new"]}, name="old", resamples=100)
    require_same(run(tmp_path, *words), expected.to_dict())  # type: ignore[arg-type]
    long = {
        "probs": [row for one in probs.values() for row in one.tolist()],
        "label": [*found["target"], *found["target"]],
        "who": ["old"] * 300 + ["new"] * 300,
    }
    require_same(run(tmp_path, write(tmp_path / "long.jsonl", long), "--model", "who"), expected.to_dict())  # type: ignore[arg-type]


def test_row_ids_bring_models_in_the_same_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = predictions()
    order = np.random.default_rng(5).permutation(300)
    ids = np.array([f"row {one}" for one in range(300)])
    one = {"probs": found["probs"].tolist(), "label": found["target"], "id": ids}
    other = {"probs": found["probs"][order].tolist(), "label": found["target"][order], "id": ids[order]}
    words = [f"a={write(tmp_path / 'a.parquet', one)}", f"b={write(tmp_path / 'b.csv.parquet', other)}"]
    assert "same rows" in refused(capsys, *words)
    report = run(tmp_path, *words, "--rows", "id")
    assert all(pair["value"] == 0 and pair["p_value"] == 1 for pair in report["paired"])


def test_calibration_rows_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    found, more = predictions(), predictions(150, 7)
    test, held = (write(tmp_path / f"{k}.parquet", columns(one, lists=True)) for k, one in enumerate((found, more)))
    own = {key: more[key] for key in ("probs", "target", "routing_weights", "expert_probs")}
    report = run(tmp_path, test, "--calibration", held, *LISTS)
    expected = evaluate(**found, calibration={**own, "groups": more["groups"]}, resamples=100).to_dict()
    require_same(report, expected)  # type: ignore[arg-type]
    assert report["records"][0]["n"] == 300


def test_rows_are_taken_once_and_never_to_calibrate_and_to_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.parquet", columns(predictions(), lists=True))
    assert "must be given once" in refused(capsys, path, path)
    assert "must be given once" in refused(capsys, f"a={path}", f"a={tmp_path / '..' / tmp_path.name / 'a.parquet'}")
    assert "calibration must hold other rows" in refused(capsys, path, "--calibration", path)
    (tmp_path / "none.csv").write_text("label,prob_0,prob_1,prob_2,prob_3\n")
    wide = write(tmp_path / "b.csv", columns(predictions(), lists=False))
    assert "calibration rows must be given" in refused(capsys, wide, "--calibration", tmp_path / "none.csv")
    run(tmp_path, f"a={path}", f"b={path}")  # one file as two models is a comparison of equals


def test_what_is_left_out_is_named_on_the_page_the_card_and_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    confidence, correct = answers()
    run(tmp_path, write(tmp_path / "a.csv", {"confidence": confidence, "correct": correct}))
    said = "no routing weights: configurations not measured"
    assert said in " ".join(capsys.readouterr().out.split())
    for name in ("index.html", "model_card.md", "table.md", "report.json"):
        assert said in (tmp_path / "out" / name).read_text(), name


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing obvious": ({"x": [1.0], "z": [2.0]}, "its columns are x, z"),
    "no labels": ({"probs": [[0.5, 0.5]]}, "give --labels COLUMN"),
    "two labels": ({"probs": [[0.5, 0.5]], "label": [0], "target": [0]}, "give --labels COLUMN"),
    "two families": ({"prob_0": [0.5], "prob_1": [0.5], "p_0": [0.5], "p_1": [0.5], "y": [0]}, "give --probs"),
    "not probabilities": ({"probs": [[0.5, 0.5], [3.0, 1.0]], "y": [0, 1]}, "in row 1; pass logits=True (--logits)"),
    "NaN": ({"probs": [[0.5, 0.5], [float("nan"), 1.0]], "y": [0, 1]}, "in row 1"),
    "a label beyond": ({"probs": [[0.5, 0.5], [0.5, 0.5]], "y": [0, 2]}, "classes in [0, 1]; got 2 in row 1"),
    "an unknown name": ({"prob_a": [0.5], "prob_b": [0.5], "y": ["c"]}, "got 'c' in row 0"),
    "a missing label": (
        {"probs": [[0.5, 0.5], [0.5, 0.5]], "y": [0, None]},
        "column 'y' must have a value in every row",
    ),
    "ragged lists": ({"probs": [[0.5, 0.5], [0.2, 0.3, 0.5]], "y": [0, 1]}, "lists of one length"),
    "per cent": ({"confidence": [0.5, 87.0], "correct": [True, False]}, "divide per cent by 100"),
    "text for a number": ({"confidence": ["high"], "correct": [True]}, "must hold numbers"),
    "a grade beyond": ({"confidence": [0.5, 0.6], "correct": [0.5, 2.0]}, "got 2 in row 1"),
    "no correctness": ({"confidence": [0.5]}, "give --correct COLUMN"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_column_is_named_with_its_first_bad_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, said = BAD[name]
    path = write(tmp_path / "a.parquet", content)
    found = refused(capsys, path)
    assert said in found
    assert str(path) in found
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.csv.gz", "a.jsonl", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"\x00garbage\xff\xfe" * 30])
def test_an_empty_or_damaged_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    found = refused(capsys, tmp_path / name)
    assert name in found
    assert "Traceback" not in found


def test_a_torn_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = columns(predictions(5000), lists=False)
    for name in ("a.parquet", "a.csv.gz"):
        path = write(tmp_path / name, content)
        path.write_bytes(path.read_bytes()[:-2000])
        assert str(path) in refused(capsys, path)


def test_files_of_other_columns_or_widths_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a.parquet", {"probs": [[0.5, 0.5]] * 3, "y": [0, 1, 0]})
    other = write(tmp_path / "b.parquet", {"probs": [[0.2, 0.3, 0.5]] * 3, "y": [0, 1, 0]})
    third = write(tmp_path / "c.parquet", {"probs": [[0.5, 0.5]] * 3, "label": [0, 1, 0]})
    assert "must hold 2 values a row, as elsewhere; got 3" in refused(capsys, one, other)
    assert f"{third} has no column 'y'" in refused(capsys, one, third)


def test_a_column_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("confidence,confidence,correct\n0.5,0.5,1\n")
    assert "'confidence' twice" in refused(capsys, tmp_path / "a.csv")


def test_a_folder_without_an_obvious_base_is_asked_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("north", "south")):
        write(tmp_path / "in" / f"{name}.parquet", columns(predictions(100, seed), lists=True))
    assert "--base NAME" in refused(capsys, tmp_path / "in")
    assert run(tmp_path, tmp_path / "in", "--base", "south")["records"][0]["shift"] == "south"


def test_runs_and_predictions_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--run", "a", "--predictions", "b"])
    assert "not allowed with" in capsys.readouterr().err
    assert "--damage must be given with --run" in refused(capsys, "a.csv", "--damage")


def test_a_folder_that_is_no_report_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    confidence, correct = answers()
    path = write(tmp_path / "a.csv", {"confidence": confidence, "correct": correct})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    assert "thesis.tex" in refused(capsys, path, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "dear"


def test_class_names_must_differ_and_a_base_needs_several_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.parquet", columns(predictions(), lists=True))
    assert "class names must be 4 different ones" in refused(capsys, path, "--class-names", *"aabc")
    assert "--base must be left out where there is one set; got 'b'" in refused(capsys, path, "--base", "b")


def test_arrays_of_another_machine_are_read(tmp_path: Path) -> None:
    confidence, correct = answers()
    np.savez(tmp_path / "a.npz", confidence=confidence.astype(">f8"), correct=correct)
    expected = evaluate(confidence=confidence, correct=correct, resamples=100).to_dict()
    require_same(run(tmp_path, tmp_path / "a.npz"), expected)  # type: ignore[arg-type]


def test_what_is_wrong_late_in_a_text_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["0.5,1"] * 5000 + ["0.5,oops"] + ["0.5,0"] * 10
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write("\n".join(["confidence,correct", *rows]))
    assert "a.csv.gz" in refused(capsys, tmp_path / "a.csv.gz")


NARROW = """
import sys
from importlib.machinery import PathFinder
absent = {"lightning", "jsonargparse", "datasets", "tensorboard", "mlflow", "wandb"}
found = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in absent else found(name, *rest))
from moe_posterior.cli import main
sys.exit(main(sys.argv[1:]) or bool(absent & set(sys.modules)))
"""


def test_the_command_needs_only_the_packages_of_its_extra(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", columns(predictions(), lists=True))
    words = ["evaluate", "--predictions", str(path), *LISTS, *FAST, "--out", str(tmp_path / "out")]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", NARROW, *words], env={"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "index.html").is_file()


KILLED = """
import os, signal, sys
import moe_posterior.report.writing as writing
def killed(*_): os.kill(os.getpid(), signal.SIGKILL)
writing.to_html = killed
from moe_posterior.cli import main
main(sys.argv[1:])
"""


def test_a_kill_half_way_leaves_the_earlier_report_whole(tmp_path: Path) -> None:
    confidence, correct = answers()
    path = write(tmp_path / "a.csv", {"confidence": confidence, "correct": correct})
    run(tmp_path, path)
    before = {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}
    words = ["evaluate", "--predictions", str(path), *FAST, "--seed", "1", "--out", str(tmp_path / "out")]
    root = str(Path(__file__).resolve().parents[2])
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], env={"PYTHONPATH": root}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()} == before
    assert run(tmp_path, path, "--seed", "1")["seed"] == 1
