"""How ``make docs`` builds the documentation: warnings are errors, so that a broken reference fails the build."""

from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

project = "moe-posterior"
author = "The moe-posterior maintainers"
release = version_of("moe-posterior")
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"moe-posterior {release}"
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
python_use_unqualified_type_names = True

nitpicky = True
# Types of other libraries, named in signatures: their documentation is not linked, so that the build needs no network.
nitpick_ignore_regex = [
    (
        r"py:class|py:obj",
        r"(torch|numpy|np|nn|lightning|pyarrow|transformers|collections|pathlib|os|torchmetrics|threading)\..*",
    ),
    (r"py:(class|obj|exc|data)", r"[A-Za-z_]*"),  # a bare name of a signature
    (r"py:class", r"moe_posterior\.calibrators\.external\._External"),  # a private base
    # Types that signatures name but the reference does not cover.
    (
        r"py:class",
        r"abc\..*|moe_posterior\.(audit|forking|kernels|memberships|metrics|pending|posterior\.belief|precision|router|training)\.[a-z_.]*[A-Z]\w*",
    ),
    (r"py:class", r"moe_posterior\.huggingface\.gates\..*"),
]


def _resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Let a docstring refer to ``BetaPosterior.add_expert`` by its public name, whichever module defines it."""
    if node.get("refdomain") != "py":
        return None
    wanted = node["reftarget"].removeprefix("moe_posterior.")
    objects = env.domains.python_domain.objects
    found = [name for name in objects if name == wanted or name.endswith(f".{wanted.rsplit('.', 1)[-1]}")]
    exact = [name for name in found if name.endswith(f".{wanted}") or _tail(name) == _tail(wanted)]
    if not exact:
        return None
    target = min(exact, key=len)
    entry = objects[target]
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, entry.objtype, target, _pointing_at(node, target), content
    )


def _tail(name: str) -> str:
    """The class and member, or the function: what is left of a dotted name without its modules."""
    parts = name.split(".")
    start = next((place for place, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    return ".".join(parts[start:])


def _pointing_at(node: pending_xref, target: str) -> pending_xref:
    copy = node.copy()
    copy["reftarget"] = target
    copy["reftype"] = "obj"
    return copy


def _keep_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """|x| in a formula is an absolute value, not a substitution."""
    lines[:] = [line if "``" in line or ">>>" in line else line.replace("|", r"\|") for line in lines]


def _keep_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """napoleon takes the text before a colon in a property's first line for a type; here it is a sentence."""
    types = [place for place, line in enumerate(lines) if line.startswith(":type: ")]
    if what in ("property", "attribute") and types:
        lines[0] = f"{lines.pop(types[0]).removeprefix(':type: ')}: {lines[0]}"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("missing-reference", _resolve_short_name)
    app.connect("autodoc-process-docstring", _keep_bars)
    app.connect("autodoc-process-docstring", _keep_colons, priority=900)  # after napoleon
    return {"parallel_read_safe": True}
