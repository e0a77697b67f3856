"""The study on a toy world: every cell is trained once and measured, whatever is interrupted; its tables say what the records hold."""

import json
import math

import pytest
import scipy.stats
import torch

from moe_posterior import InvalidArgumentError
from moe_posterior.calibrators import Outputs, TemperatureScaling
from moe_posterior.errors import MissingDataError
from moe_posterior.metrics import calibration_error
from moe_posterior.training.data.base import ClassificationData, Split
from moe_posterior.training.data.features import PassThrough
from moe_posterior.training.study import choice, cli, measure, plan, sources, tables, train, values


class Blobs(ClassificationData):
    """Three classes in four dimensions, three groups; the test rows are noisier than the others."""

    name, class_names, group_names = "blobs", ("a", "b", "c"), ("x", "y", "z")

    def load(self) -> dict[str, Split]:
        generator = torch.Generator().manual_seed(self.seed)
        splits = {}
        for part, rows, noise in (("train", 300, 1.0), ("val", 120, 1.0), ("test", 700, 2.0)):
            target = torch.randint(3, (rows,), generator=generator)
            points = noise * torch.randn(rows, 4, generator=generator)
            points[:, 0] += 2.0 * target
            splits[part] = Split(points, target, groups=torch.randint(3, (rows,), generator=generator))
        return splits

    def groups_of(self, part: str) -> torch.Tensor:
        groups = self.split(part).groups
        assert groups is not None
        return groups

    def subsets(self) -> dict[str, torch.Tensor]:
        overall = super().subsets()["overall"]
        return {"overall": overall, "hard": overall & (torch.arange(len(overall)) % 3 > 0)}


def toy(setting: str, seed: int, inner: str | None) -> ClassificationData:
    data = Blobs(batch_size=64, seed=seed)
    number = None if inner is None else data.group_names.index(inner)
    left_out = None if number is None else (lambda part: data.groups_of(part) == number)
    return sources.Source(data, data.groups_of, data.group_names, left_out)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """The study "comments" on the toy world, with three methods."""
    monkeypatch.setitem(sources.SOURCES, "comments", toy)
    arms = [("softmax", "single"), ("average", "ensemble"), ("softmax", "vanilla"), ("softmax", "robust filtered")]
    monkeypatch.setattr(plan, "ARMS", (*arms, ("posterior", "vanilla"), ("posterior", "robust filtered")))
    monkeypatch.setattr(plan, "OURS", ("vanilla", "robust filtered"))
    monkeypatch.setattr(measure, "OUTSIDE", {})
    study = plan.Study("comments", ("toy",), 2, 3, 2, {"toy": ("y",)}, lambda shape, members: PassThrough(shape[0]))
    monkeypatch.setitem(plan.STUDIES, "comments", study)
    return study


def test_a_study_trains_measures_and_goes_on_where_it_stopped(small, tmp_path, monkeypatch, capsys) -> None:
    out, arguments = tmp_path / "c.json", ["comments", "--run-dir", str(tmp_path / "runs"), "--seeds", "2"]
    trained = []
    original = train.train_cell

    def counting(cell, study, folder):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(cell.key)
        return original(cell, study, folder)

    monkeypatch.setattr(cli, "train_cell", counting)
    with pytest.raises(KeyboardInterrupt):
        cli.study(arguments)
    monkeypatch.setattr(cli, "train_cell", lambda *a: (trained.append(a[0].key), original(*a))[1])
    assert cli.study([*arguments, "--out", str(out), "--markdown", str(tmp_path / "c.md")]) == 0
    expected = (
        2 * (2 + 2 * 2) + 2 * 2
    )  # a seed: single, ensemble, two methods a gate; of the first, as many simulations
    assert len(trained) == len(set(trained)) == expected
    records = cli.one_by_one(json.loads(out.read_text())["records"])
    assert {record["seed"] for record in records} == {42, 43}
    assert {"none", "temperature", "configuration", "shift-aware", "online"} <= {r["calibrator"] for r in records}
    assert all(math.isfinite(record["value"]) for record in records)
    text = (tmp_path / "c.md").read_text()
    assert "ours against the published methods" in text
    before = len(trained)
    cli.study([*arguments, "--out", str(out)])
    assert len(trained) == before
    capsys.readouterr()
    figure = tmp_path / "c.png"
    assert cli.study(["comments", "--from", str(out), "--figure", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "CAD (keyword groups): methods, 2 seeds" in capsys.readouterr().out


def test_members_of_an_ensemble_learn_from_their_own_errors_alone() -> None:
    cell, study = plan.Cell("pacs", "sketch", "average", "ensemble", 0), plan.STUDIES["pacs"]
    model = cell.model(study, (10,), 7, 1)
    prediction = model.predict(torch.rand(6, 10))
    experts = prediction.need("expert_probs")
    assert torch.allclose(prediction.probs, experts.mean(dim=1), atol=1e-6)
    experts[:, 1].square().sum().backward()
    moved = [
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in member.parameters())
        for member in model.backbone.members
    ]
    assert moved == [False, True, False, False]


def test_combinations_are_ranked_on_simulated_shift_and_within_a_point_of_the_best_accuracy() -> None:
    rows = [("a", 0.80, 0.05), ("b", 0.795, 0.03), ("c", 0.70, 0.01)]
    records = [
        record(subset="simulated", method=method, metric=metric, value=value)
        for method, *cells in rows
        for metric, value in zip(("accuracy", "ece_debiased"), cells, strict=True)
    ]
    table = next(t for t in tables.tables_of(records) if "simulated" in t.title)
    assert [(row[0], row[-1]) for row in table.rows] == [("b", "yes"), ("a", "yes"), ("c", "no")]


def test_a_setting_is_chosen_for_by_its_own_simulated_shifts_alone() -> None:
    def both(setting: str, method: str, simulated: float, hard: float) -> list[dict]:
        arm = {"setting": setting, "method": method, "gate": "posterior"}
        return [
            record(subset=subset, metric=metric, value=value, **arm)
            for subset, error in (("simulated", simulated), ("hard", hard))
            for metric, value in (("accuracy", 0.8), ("ece_debiased", error))
        ]

    records = [
        *both("a", "x", 0.1, 0.5),
        *both("a", "y", 0.2, 0.0),
        *both("b", "x", 0.9, 0.0),
        *both("b", "y", 0.1, 0.3),
    ]
    table = next(t for t in tables.tables_of([record(metric="ece_debiased"), *records]) if "ours against" in t.title)
    assert table.rows[0][:2] == ["ours", ".400"]


def test_what_is_left_out_is_trained_on_nowhere_and_judged_whole() -> None:
    whole, data = toy("toy", 0, None), toy("toy", 0, "y")
    sizes = {part: len(data.split(part)) for part in ("train", "val", "test", sources.SIMULATED_SPLIT)}
    assert sizes["train"] + sizes["val"] + sizes[sources.SIMULATED_SPLIT] == 420
    assert sizes["test"] == 700
    for part in ("train", "val"):
        assert not (data.split(part).groups == 1).any()
        assert (whole.split(part).groups == 1).any()


def test_outputs_survive_the_disk(tmp_path) -> None:
    probs = torch.rand(5, 3).softmax(dim=-1)
    outputs = Outputs(
        probs, probs[:, None], torch.ones(5, 1), torch.arange(5), torch.rand(5), torch.rand(5), torch.zeros(5).long()
    )
    train.save_outputs(tmp_path / "x.npz", {"val": (outputs, torch.arange(5))})
    stored, target = train.load_outputs(tmp_path / "x.npz")["val"]
    assert all(torch.equal(a, b) for a, b in zip(outputs, stored, strict=True))
    assert torch.equal(target, torch.arange(5))


def overconfident(rows: int, seed: int) -> tuple[Outputs, torch.Tensor]:
    """Shown at the square of what is true."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, 3, generator=generator)
    target = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    probs = (2 * logits).softmax(dim=-1)
    zeros = torch.zeros(rows)
    return Outputs(probs, probs[:, None], torch.ones(rows, 1), zeros.long(), zeros, zeros, zeros.long()), target


def test_calibrators_are_fitted_on_validation_rows_alone(monkeypatch) -> None:
    monkeypatch.setitem(sources.SOURCES, "comments", toy)
    monkeypatch.setattr(measure, "OUTSIDE", {})
    cell = plan.Cell("comments", "toy", "softmax", "vanilla", 0)
    validation, test = overconfident(500, 1), overconfident(700, 2)
    found = measure.figures_of_cell(cell, {"val": validation, "test": test})
    of = {(r["calibrator"], r["subset"], r["metric"]): r["value"] for r in found}
    hard = cell.data().subsets()["hard"]
    scaled = TemperatureScaling().fit(*validation)(test[0])
    assert of["temperature", "hard", "ece"] == pytest.approx(
        float(calibration_error(scaled[hard], test[1][hard])), abs=1e-5
    )
    assert of["none", "overall", "ece"] == pytest.approx(float(calibration_error(test[0].probs, test[1])), abs=1e-5)
    assert of["temperature", "overall", "ece"] < of["none", "overall", "ece"] / 2


def record(**values) -> dict:
    base = {"study": "pacs", "setting": "a", "gate": "softmax", "method": "vanilla", "calibrator": "none"}
    return {**base, "subset": "hard", "metric": "ece", "seed": 1, "value": 0.0, **values}


def test_a_mean_over_settings_wants_all_of_them() -> None:
    records = [record(value=0.1), record(setting="b", value=0.3), record(seed=2, value=0.7)]
    assert values.by_seed(records, method="vanilla") == {1: pytest.approx(0.2)}


def test_paired_intervals_are_those_of_scipy() -> None:
    ours, other = {s: 0.1 * s for s in range(5)}, {s: 0.05 * s * s + 0.01 for s in range(5)}
    value, half = values.paired(ours, other)
    differences = [ours[s] - other[s] for s in range(5)]
    interval = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (value - half, value + half) == pytest.approx((interval.low, interval.high), rel=1e-3)


def test_our_combination_is_compared_with_every_published_method_as_published_and_with_the_same_calibrator() -> None:
    method, gate, calibrator = choice.ELSEWHERE
    ours = {"method": method, "gate": gate, "calibrator": calibrator}
    records = []
    for seed in (0, 1, 2):
        for metric in ("ece", "accuracy"):
            records.append(record(seed=seed, metric=metric, value=0.1 + 0.01 * seed, **ours))
            for name in ("none", "expert temperature", "expert temperature, stopped"):
                records.append(record(seed=seed, metric=metric, value=0.3 + 0.01 * seed, calibrator=name))
                records.append(record(seed=seed, metric=metric, value=0.4, method="robust", calibrator=name))
                records.append(
                    record(seed=seed, metric=metric, value=0.0, method="robust", gate="posterior", calibrator=name)
                )
    table = next(t for t in tables.tables_of(records) if "ours against" in t.title)
    difference = {row[0]: row[2] for row in table.rows[1:]}
    assert difference.keys() == {"vanilla", "mocae", "mocae, stopped", "robust", "robust + expert temperature"}
    assert difference["vanilla"] == difference["mocae"] == "-.200 ± .000"
    assert difference["robust"].startswith("-.290 ± .02")


def summary_records(study: str, seeds: dict[int, float]) -> list[dict]:
    """Vanilla errs by .2 on hard rows; the learned prior by as much less as the seed says."""
    found = []
    for seed, less in seeds.items():
        for gate, error in (("softmax", 0.2), ("learned", 0.2 - less)):
            for metric, value in (("accuracy", 0.7), ("ece_debiased", error)):
                one = {"study": study, "setting": "s", "method": "vanilla", "gate": gate, "calibrator": "none"}
                found.append({**one, "subset": "hard", "metric": metric, "seed": seed, "value": value})
    return found


def test_the_summary_holds_every_data_set_and_its_differences_are_paired_over_seeds(tmp_path, capsys) -> None:
    files = []
    for study, seeds in (("pacs", {1: 0.1, 2: 0.06}), ("comments", {1: 0.0, 2: 0.02, 3: 0.04})):
        files.append(str(tmp_path / f"{study}.parquet"))
        cli.write_rows(files[-1], {"about": {"command": "made"}}, cli.over_seeds(summary_records(study, seeds)))
    assert cli.study(["summary", "--from", *files, "--markdown", str(tmp_path / "s.md")]) == 0
    text = (tmp_path / "s.md").read_text()
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert cells["vanilla"] == [".700 ± .000", ".200 ± .000"] * 2
    half = scipy.stats.t.ppf(0.975, 2) * 0.02 / math.sqrt(3)
    assert cells["vanilla, learned prior − vanilla"][3] == f"-.020 ± {half:.3f}".replace(" 0.", " .")
    assert cells["vanilla, learned prior − vanilla"][1].startswith("-.080 ±")
    assert cells["Robust − vanilla"] == ["–"] * 4  # nothing of it in the records
    assert "PACS: 1 2; CAD (keyword groups): 1 2 3" in text


@pytest.mark.parametrize(
    ("numbers", "text"), [([0.2, 0.3], ".250 ± .635"), ([20.5, 20.5], "20.500 ± .000"), ([-0.5], "-.500")]
)
def test_numbers_lose_their_leading_zero_and_nothing_else(numbers: list[float], text: str) -> None:
    assert values.shown(dict(enumerate(numbers))) == text


def test_cells_of_other_settings_are_not_mixed_in(small, tmp_path) -> None:
    folder = tmp_path / "runs" / "study-comments"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({**plan.settings_of(small), "learning_rate": 0.5}))
    with pytest.raises(InvalidArgumentError, match="was made with other settings"):
        cli.study(["comments", "--run-dir", str(tmp_path / "runs"), "--seeds", "1"])


def test_labels_hidden_in_groups_reach_no_calibrator() -> None:
    outputs, target = overconfident(300, 3)
    told = outputs._replace(domain=2 * torch.randint(2, (300,)) + target.clamp(max=1))
    cell = plan.Cell("comments", "toy", "softmax", "vanilla", 0)
    assert torch.equal(measure._without_labels(cell, told).domain, told.domain // 2)
    cifar = plan.Cell("cifar10h", "hard", "softmax", "vanilla", 0)
    assert "multi-domain temperature" not in measure.fit_static(measure._without_labels(cifar, told), target)


def test_arms_can_be_left_out_by_gate_or_method() -> None:
    kept = plan.arms_without(["learned", "fgr"])
    assert ("posterior", "vanilla") in kept
    assert not any("learned" in arm or "fgr" in arm for arm in kept)
    with pytest.raises(InvalidArgumentError, match="nobody"):
        plan.arms_without(["nobody"])


def test_mistakes_say_what_to_do(tmp_path) -> None:
    with pytest.raises(MissingDataError, match=r"--out nowhere\.json"):
        cli.study(["pacs", "--from", "nowhere.json"])
    with pytest.raises(InvalidArgumentError, match="--seeds must be at least 1"):
        cli.study(["pacs", "--seeds", "0", "--run-dir", str(tmp_path)])
    with pytest.raises(InvalidArgumentError, match="--from must name the file of records of every data set"):
        cli.study(["summary"])
    with pytest.raises(InvalidArgumentError, match="--from must name one file, unless for summary"):
        cli.study(["pacs", "--from", "a.json", "b.json"])
    with pytest.raises(
        MissingDataError, match=r"there is no .*none.json; make it with: moe-posterior study NAME --out FILE"
    ):
        cli.study(["summary", "--from", str(tmp_path / "none.json")])
