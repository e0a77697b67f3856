"""The page of a log: complete, self-contained, escaped, bounded, and alive in a browser."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from audit.worlds import EMBEDDINGS, C, E, new_router
from browser import CHROMIUM, browse
from scipy.stats import beta

from moe_posterior import PosteriorRouter
from moe_posterior.audit import AuditError, AuditLog
from moe_posterior.audit.views.charts import CLUSTERS, EXPERTS, PANELS, interval
from moe_posterior.audit.views.cli import audit
from moe_posterior.audit.views.page import when, write_page
from moe_posterior.audit.views.survey import survey
from moe_posterior.escape import terminal

HOSTILE = "\"><img src=x onerror=alert(1)><script>alert(1)</script>&amp;'\x1b[31m"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (Debian: chromium)")


class Parsed(HTMLParser):
    """Elements and tables of a document; refuses one that closes what it did not open."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, column: str) -> list[dict[str, str]]:
        """The rows of the first table that has this column."""
        head, *rows = next(rows for rows in self.tables if column in rows[0])
        return [dict(zip(head, row, strict=True)) for row in rows]


def failing(log: AuditLog, name: str = "router", calls: int = 40) -> PosteriorRouter:
    """A router one of whose experts begins to fail halfway, and is replaced in the end; one outcome comes twice."""
    router = new_router(None, exploration=0.4, abstain_below=0.45)
    router._audit = log.follow(router, name)
    rng = np.random.default_rng(3)
    for call in range(calls):
        decisions = router.route_batch(EMBEDDINGS[rng.integers(200, size=20)])
        bad = (decisions.experts == 1) & (call > calls // 2)
        if call % 5 == 0:
            log.flush()
        router.resolve_batch(decisions.ids[:-1], np.where(bad, 0.0, rng.random(bad.shape) < 0.8)[:-1])
    with pytest.raises(ValueError, match="resolved already"):
        router.resolve(int(decisions.ids[0]), 1.0)
    router.gate.configure(risk_aversion=0.25)
    router.replace_expert(2)
    router.route(EMBEDDINGS[0])
    return router


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("log")
    with AuditLog(made) as log:
        failing(log)
    return made


@pytest.fixture(scope="module")
def document(folder: Path, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("page") / "audit.html"
    write_page(folder, file)
    assert [path.name for path in file.parent.iterdir()] == ["audit.html"]
    return file.read_text(encoding="utf-8")


def test_the_page_is_one_well_formed_file_that_refers_to_nothing_outside(document: str) -> None:
    page = Parsed(document)
    assert not re.search(r"https?://|//[a-z]|url\(|@import", document)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.elements:
        assert attrs.get("src") is None, tag
        assert not attrs.get("href") or attrs["href"] == "data:," or attrs["href"].removeprefix("#") in ids
    assert all(len({len(row) for row in rows}) == 1 for rows in page.tables)


def test_the_page_shows_what_the_log_holds(folder: Path, document: str) -> None:
    page, log = Parsed(document), AuditLog(folder, mode="r")
    decisions, outcomes = log.decisions().to_pylist(), log.outcomes().to_pylist()
    (summary,) = page.table("pending")
    assert summary["decisions"] == f"{len(decisions):,}" == "801"
    assert (summary["outcomes"], summary["pending"], summary["refused"]) == ("760", "41", "1")
    assert summary["abstained"].endswith(f" {sum(row['abstain'] for row in decisions)}")
    assert summary["explored"].endswith(f" {sum(row['explored'] for row in decisions)}")
    seen = [row["signal"] for row in outcomes if row["accepted"]]
    assert summary["mean outcome"] == f"{np.mean(seen):.3f}"
    assert [row["outcomes"] for row in page.table("reason")] == ["1"]
    state = {row["log"]: row["state"] for row in page.table("state")}
    assert state["head"] == log.head.digest.hex()
    assert "closed by its writer" in state["chain"]
    configured = {row["setting"]: row["value"] for row in page.table("setting")}
    assert (configured["risk_aversion"], configured["num_experts"]) == ("0.25", str(E))
    happened = [row["what"] for row in page.table("what")]
    assert happened[0].startswith("expert 2 replaced")
    assert "risk_aversion 1.0 → 0.25" in " ".join(happened)


def test_the_failing_expert_is_flagged_with_its_decision_and_has_the_lowest_competence(
    folder: Path, document: str
) -> None:
    page = Parsed(document)
    (source,) = survey(AuditLog(folder, mode="r").read()).sources.values()
    flags = page.table("until")
    assert len(flags) == len(source.flags())
    assert flags[0]["cluster"] == "all"
    mine = [row for row in flags if row["expert"] == "1"]
    assert {"the pool's mean"} <= {row["below"] for row in mine}
    ids = {f"{flag.decision:,}" for flag in source.flags()}
    assert {row["decision"] for row in flags} == ids
    rows = page.table("low")
    assert len(rows) == E
    competence = {row["expert"]: float(row["where asked"].split()[0]) for row in rows}
    assert min(competence, key=competence.__getitem__) == "1"


def test_intervals_are_those_of_the_beta_distribution() -> None:
    a, b = np.array([[1.0, 3.5, np.nan], [200.0, 90.0, 5e5]]), np.array([[1.0, 9.0, 1.0], [30.0, 400.0, 5e5]])
    low, high = interval(a, b)
    for level, found in ((0.025, low), (0.975, high)):
        np.testing.assert_allclose(found, beta.ppf(level, a, b), atol=2e-3)
        np.testing.assert_allclose(found[0], beta.ppf(level, a, b)[0], atol=1e-9)


def test_a_time_that_no_calendar_has_is_shown_as_it_is() -> None:
    assert when(10**300) == f"{10**300} µs"
    assert when(-(10**30)) == f"{-(10**30)} µs"


def test_no_name_becomes_markup(tmp_path) -> None:
    calm, attacked = [], []
    for name, shapes in (("router", calm), (HOSTILE, attacked)):
        folder = tmp_path / str(len(name))
        with AuditLog(folder) as log:
            failing(log, name)
            log.put(_event(name))
        write_page(folder, tmp_path / "page.html")
        parsed = Parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
        shapes += [(tag, [n for n in attrs if n != "class"]) for tag, attrs in parsed.elements]
    assert attacked == calm
    assert sum(terminal(HOSTILE) in cell for rows in parsed.tables for row in rows for cell in row) > 5


def _event(name: str):
    from moe_posterior.audit.storage.collect import Event

    return Event(0, {"event": name, "time": 1, "lost": {name: 7}, "detail": name})


def test_the_command_writes_the_page_of_a_keyed_log(tmp_path, capsys) -> None:
    key, file = tmp_path / "key", tmp_path / "page.html"
    key.write_bytes(b"k" * 32)
    with AuditLog(tmp_path / "log", key=key.read_bytes()) as log:
        failing(log)
    asked = ["export", str(tmp_path / "log"), "--html", str(file)]
    with pytest.raises(AuditError, match="sealed with a key"):
        audit(asked)
    assert audit([*asked, "--key-file", str(key)]) == 0
    assert str(file) in capsys.readouterr().out
    state = {row["log"]: row["state"] for row in Parsed(file.read_text(encoding="utf-8")).table("state")}
    assert state["key"] == "every hash is a MAC under the log's key"


def test_a_compacted_log_tells_the_same(tmp_path) -> None:
    found = []
    for compacted in (False, True):
        folder = tmp_path / str(compacted)
        with AuditLog(folder, fsync_every=0.0, rotate_bytes=3000) as log:
            failing(log)
            if compacted:
                log.flush()
                assert log.compact() > 1
        (source,) = survey(AuditLog(folder, mode="r").read()).sources.values()
        flags = [(f.expert, f.cluster, f.against, f.number, round(f.mean, 9), f.ended) for f in source.flags()]
        found.append((source.decisions, source.outcomes, source.traffic.tolist(), flags))
    assert found[0] == found[1]


def test_a_log_that_nobody_recorded_to_says_so_and_writes_no_page(tmp_path) -> None:
    AuditLog(tmp_path / "log").close()
    with pytest.raises(AuditError, match="no router"):
        write_page(tmp_path / "log", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_a_large_pool_and_a_long_log_stay_one_small_page(tmp_path) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(4000, 8)).astype(np.float32)
    with AuditLog(tmp_path / "log", fsync_every=1.0) as log:
        for source in range(4):
            router = PosteriorRouter(200, 8, 40, exploration=0.5, max_pending=10_000)
            router._audit = log.follow(router, f"router {source}")
            router.fit(embeddings)
            for _ in range(8):
                decisions = router.route_batch(embeddings)
                good = rng.random(decisions.experts.shape) < np.where(decisions.experts % 3 == 0, 0.05, 0.9)
                router.resolve_batch(decisions.ids, good)
    write_page(tmp_path / "log", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert text.count('role="img"') == 3 * (EXPERTS + CLUSTERS * PANELS)


PROBE = """
  for (const one of page.querySelectorAll("details")) one.open = true;
  const size = (one) => { const box = one.getBoundingClientRect(); return [box.width, box.height]; };
  const head = [...page.querySelectorAll("#competence th button")].find((one) => one.textContent === "where asked");
  const column = () => [...page.querySelectorAll("#competence tbody tr")].map((row) => row.cells[7].dataset.key);
  head.click();
  const ascending = column();
  page.getElementById("theme").click();
  return {
    ascending, columns: [...page.querySelectorAll("#competence th")].map((one) => one.textContent),
    figures: [...page.querySelectorAll("figure .panel svg")].map(size),
    bands: page.querySelectorAll("figure .panel path.band").length,
    texts: [...page.querySelectorAll("figure .panel svg text")].map((text) => {
      const box = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
      return box.left >= svg.left - 1 && box.right <= svg.right + 1 && box.top >= svg.top - 1 && box.bottom <= svg.bottom + 1;
    }),
    paper: view.getComputedStyle(page.body).backgroundColor,
    overflow: page.documentElement.scrollWidth - view.innerWidth,
  };
"""


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (400, True)])
def test_the_page_lives_in_a_browser(tmp_path, document: str, width: int, dark: bool) -> None:
    found, console = browse(document, PROBE, tmp_path, width, dark)
    assert console == []
    assert found["columns"][7] == "where asked"
    keys = [float(key) for key in found["ascending"] if key]
    assert keys == sorted(keys)
    assert len(keys) == E
    assert len(found["figures"]) == found["bands"] == E + C * min(PANELS, E)
    assert all(wide > 150 and tall > 100 for wide, tall in found["figures"])
    assert all(found["texts"]), "text outside its figure"
    assert found["overflow"] <= 0
    assert found["paper"] == ("rgb(255, 255, 255)" if dark else "rgb(20, 24, 29)")
