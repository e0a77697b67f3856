"""Draw the rooms of the package and which imports which, from the imports themselves: docs/architecture.svg and its table.

python docs/draw_architecture.py          # rewrites docs/architecture.svg and docs/architecture.md
"""

import ast
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

PACKAGE = Path(__file__).resolve().parent.parent / "moe_posterior"
HERE = Path(__file__).resolve().parent


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    folders = [PACKAGE, PACKAGE / "kernels", PACKAGE / "training"]  # rglob does not follow the two symlinks
    found = {path for folder in folders for path in folder.rglob("*.py")}
    return sorted(
        path for path in found if not (room_of(path) == "kernels" and path.name.startswith("bench"))
    )  # scripts


def rooms_used(path: Path) -> set[str]:
    """The rooms that a file names in its imports."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        used |= {name.split(".")[1] for name in names if name.startswith("moe_posterior.")}
    return used


def levels(uses: dict[str, set[str]]) -> dict[str, int]:
    """How many imports lie below each room: 0 for those that use no other."""
    known: dict[str, int] = {}

    def level(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise SystemExit(f"circular imports: {' -> '.join([*above, room])}")
        if room not in known:
            known[room] = 1 + max((level(used, (*above, room)) for used in uses[room]), default=-1)
        return known[room]

    for room in uses:
        level(room)
    return known


def main() -> None:
    lines: dict[str, int] = defaultdict(int)
    purpose: dict[str, str] = {}
    uses: dict[str, set[str]] = defaultdict(set)
    for path in files():
        room = room_of(path)
        if room == "__init__":
            continue
        lines[room] += len(path.read_text().splitlines())
        uses[room] |= rooms_used(path)
        if path.parent == PACKAGE or path == PACKAGE / room / "__init__.py":
            purpose[room] = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
    purpose.setdefault("kernels", "Routing in plain torch, on a CPU, and in Triton.")
    purpose.setdefault("training", "The Lightning command line: data, methods, study, report.")
    for room in uses:
        uses[room] = {used for used in uses[room] if used in lines and used != room}
    height = levels(uses)
    draw(height, uses, lines)
    write_table(height, uses, lines, purpose)


def reached(room: str, uses: dict[str, set[str]]) -> set[str]:
    """The rooms below a room, by any number of steps."""
    return uses[room] | {below for other in uses[room] for below in reached(other, uses)}


def draw(height: dict[str, int], uses: dict[str, set[str]], lines: dict[str, int]) -> None:
    plt.rcParams["svg.hashsalt"] = "moe-posterior"  # the same picture gives the same bytes
    figure, axes = plt.subplots(figsize=(11, 9))
    rows: dict[int, list[str]] = defaultdict(list)
    for room, level in sorted(height.items()):
        rows[level].append(room)
    place = {room: ((column + 0.5) / len(row), level) for level, row in rows.items() for column, room in enumerate(row)}
    for room, used in uses.items():
        implied = {below for other in used for below in reached(other, uses)}
        for other in sorted(used - implied):  # the same order, the same bytes
            (x0, y0), (x1, y1) = place[room], place[other]
            axes.annotate(
                "", (x1, y1 + 0.16), (x0, y0 - 0.16), arrowprops={"arrowstyle": "->", "color": "0.65", "linewidth": 0.7}
            )
    for room, (x, y) in place.items():
        axes.text(
            x,
            y,
            f"{room}\n{lines[room]:,}",
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round", "facecolor": "0.95"},
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, max(rows) + 0.5)
    axes.axis("off")
    figure.savefig(HERE / "architecture.svg", metadata={"Date": None}, bbox_inches="tight")


def write_table(
    height: dict[str, int], uses: dict[str, set[str]], lines: dict[str, int], purpose: dict[str, str]
) -> None:
    text = [
        "# Architecture",
        "",
        "Rooms of the package, and which imports which. Imports run one way, downwards; a test checks this. Numbers are lines.",
        "Drawn from the imports by `python docs/draw_architecture.py`; arrows implied by others are left out.",
        "",
        "![Rooms and imports](architecture.svg)",
        "",
        "| room | what it is | lines | imports |",
        "|---|---|--:|---|",
    ]
    for room in sorted(height, key=lambda room: (height[room], room)):
        text.append(f"| `{room}` | {purpose[room]} | {lines[room]:,} | {', '.join(sorted(uses[room])) or '–'} |")
    (HERE / "architecture.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
