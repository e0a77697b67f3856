"""The command line shows, counts and judges a log; nothing in it can do anything to a terminal."""

import json
from html import escape
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from audit.worlds import EMBEDDINGS, C, D, E, live, new_router

from moe_posterior import PosteriorRouter
from moe_posterior.audit import AuditLog
from moe_posterior.cli import main
from moe_posterior.results.tables import estimate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "log"
    with AuditLog(folder) as log:
        router = new_router(log, top_k=2, exploration=0.3, abstain_below=0.4)
        live(router, 60, seed=1)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main(["audit", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_show_filters_and_prints_full_entries(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = AuditLog(folder, mode="r").decisions().to_pylist()
    status, text = run(capsys, "show", folder, "--expert", 3, "--cluster", 1, "--last", 4, "--json")
    shown = [json.loads(line) for line in text.splitlines()]
    wanted = [entry for entry in entries if 3 in entry["experts"] and entry["cluster"] == 1][-4:]
    assert status == 0
    assert [entry["id"] for entry in shown] == [entry["id"] for entry in wanted]
    assert shown[0]["alpha"] == wanted[0]["alpha"]
    status, text = run(capsys, "show", folder, "--id", entries[5]["id"])
    assert str(entries[5]["id"]) in text
    assert text.endswith("1 decisions\n")


def test_stats_are_those_of_a_plain_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = AuditLog(folder, mode="r").decisions().to_pylist()
    won, seen, chosen = np.zeros(E), np.zeros(E), np.zeros(E)
    for entry in entries:
        for slot, expert in enumerate(entry["experts"]):
            chosen[expert] += 1
            if entry["signal"] is not None and not np.isnan(entry["signal"][slot]):
                seen[expert] += 1
                won[expert] += entry["signal"][slot]
    status, text = run(capsys, "stats", folder, "--json")
    (source,) = json.loads(text)["sources"]
    assert status == 0
    assert source["decisions"] == len(entries)
    assert source["outcomes"] == sum(entry["signal"] is not None for entry in entries)
    assert source["abstained"] == sum(entry["abstain"] for entry in entries) > 0
    assert source["explored_share"] == pytest.approx(np.mean([entry["explored"] for entry in entries]))
    assert source["decisions_by_cluster"] == [sum(entry["cluster"] == c for entry in entries) for c in range(C)]
    for expert, row in enumerate(source["experts"]):
        assert (row["chosen"], row["outcomes"]) == (chosen[expert], seen[expert])
        assert row["observed"] == pytest.approx(won[expert] / seen[expert])
    assert "competence, 95 %" in run(capsys, "stats", folder)[1]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_stats_page_and_live_view_tell_the_same_competence_as_the_router_believes(
    warm: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = np.array([0.95, 0.2, 0.6, 0.9, 0.4])
    with AuditLog(tmp_path / "log") as log:
        router = new_router(log, abstain_below=None, score="lcb")  # by default the unobserved inherit a drift
        if warm:
            router.warm_start(EMBEDDINGS, np.tile(quality, (200, 1)), strength=40.0)
        for row in range(60):
            decision = router.route(EMBEDDINGS[row])
            router.resolve(decision.id, 0.0 if row % 3 else 1.0)
        router.route_batch(EMBEDDINGS)  # so that the log holds every row as it is in the end
    mean, std = router.posterior.mean().numpy(), router.posterior.std().numpy()
    (source,) = json.loads(run(capsys, "stats", tmp_path / "log", "--json")[1])["sources"]
    traffic = np.zeros((C, E))
    for entry in AuditLog(tmp_path / "log", mode="r").decisions(posterior=False).to_pylist():
        traffic[entry["cluster"], entry["experts"][0]] += 1
    table = run(capsys, "stats", tmp_path / "log")[1]
    run(capsys, "export", tmp_path / "log", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    live_view = run(capsys, "watch", tmp_path / "log", "--once")[1]
    for expert, row in enumerate(source["experts"]):
        half = 1.96 * np.sqrt((std[:, expert] ** 2).sum()) / C
        believed = mean[:, expert].mean()
        bounds = [max(0, believed - half), min(1, believed + half)]
        assert [row["competence"], row["low"], row["high"]] == pytest.approx([believed, *bounds])
        if warm and not row["outcomes"]:
            assert row["competence"] == pytest.approx(quality[expert], abs=0.03)
            assert row["observed"] is None
        if traffic[:, expert].any():
            assert row["asked"] == pytest.approx(np.average(mean[:, expert], weights=traffic[:, expert]))
            assert f"{believed:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]" in live_view
        assert f"{believed:.4f} [{bounds[0]:.3f}, {bounds[1]:.3f}]" in table
        cell = estimate(believed, *bounds)
        assert escape(cell.text) in page


def test_verify_and_replay_judge_by_their_exit_status(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = run(capsys, "verify", folder, "--decisions")
    assert status == 0
    assert text.endswith("sound\n")
    assert "0 not, 0 not recomputable" in text
    head = AuditLog(folder, mode="r").head.digest.hex()
    assert run(capsys, "verify", folder, "--head", head)[0] == 0
    assert run(capsys, "verify", folder, "--head", "00" * 32)[0] == 1
    status, text = run(capsys, "replay", folder, "--out", tmp_path / "router.pt")
    assert status == 0
    assert "bit for bit" in text
    assert PosteriorRouter.load(tmp_path / "router.pt").route(EMBEDDINGS[0]).experts
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".audit":
            data[len(data) // 2] ^= 4
        (copy / path.name).write_bytes(data)
    status, text = run(capsys, "verify", copy)
    assert (status, text[:8]) == (1, "ALTERED:")
    assert main(["audit", "show", str(copy)]) == 2
    assert main(["audit", "show", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_exported_tables_hold_what_the_log_holds(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert run(capsys, "export", folder, "--out", tmp_path, "--format", form)[0] == 0
    read = pyarrow.parquet.read_table if form == "parquet" else pyarrow.csv.read_csv
    log = AuditLog(folder, mode="r")
    decisions = read(tmp_path / f"decisions.{form}")
    assert decisions["id"].to_pylist() == log.decisions()["id"].to_pylist()
    assert len(read(tmp_path / f"outcomes.{form}")) == len(log.outcomes())
    assert len(read(tmp_path / f"posterior.{form}")) == len(log.read().posterior())
    if form == "csv":
        experts = [[int(e) for e in text.split(";")] for text in decisions["experts"].to_pylist()]
        assert experts == log.decisions()["experts"].to_pylist()


def test_a_hostile_name_breaks_neither_the_terminal_nor_a_spreadsheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "=cmd|'/c calc'!A1\x1b[2J\x1b]0;owned\x07\r\n../../etc\u202egpj"
    with AuditLog(tmp_path / "log") as log:
        router = PosteriorRouter(E, D, C)
        router._audit = log.follow(router, name)
        router.fit(EMBEDDINGS)
        live(router, 3, seed=0)
    for command in (["show"], ["stats"], ["verify", "--decisions"], ["show", "--json"], ["stats", "--json"]):
        status, text = run(capsys, command[0], tmp_path / "log", *command[1:])
        assert status == 0
        assert all(c.isprintable() or c == "\n" for c in text)
    run(capsys, "export", tmp_path / "log", "--out", tmp_path / "out", "--format", "csv")
    text = (tmp_path / "out" / "decisions.csv").read_text()
    assert '"=cmd' not in text
    assert "\x1b" not in text
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "log", tmp_path / "out"}


def test_a_keyed_log_is_read_with_its_key_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_bytes(b"0123456789abcdef")
    with AuditLog(tmp_path / "log", key=b"0123456789abcdef") as log:
        live(new_router(log), 3, seed=0)
    assert run(capsys, "verify", tmp_path / "log", "--key-file", tmp_path / "key")[0] == 0
    assert run(capsys, "verify", tmp_path / "log")[0] == 1


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_a_folder_without_a_log_is_missing_and_not_altered(tmp_path: Path, what: str, capsys) -> None:
    folder = tmp_path / what
    if what == "file":
        folder.write_text("x")
    elif what == "empty":
        folder.mkdir()
    assert main(["audit", "verify", str(folder)]) == 2
    said = capsys.readouterr()
    assert "there is no audit log in" in said.err
    assert "ALTERED" not in said.out
