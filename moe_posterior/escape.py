"""Make names and messages safe to display: one escape function for each kind of output.

Arms, data sets, routers and experts are named by users, and a log or a report may come from anywhere. So displayed text must not
control a terminal, add markup, break a table, reverse text direction or be read as a formula.
"""

import re
from html import escape as _escape_html

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#]|:(?=//)|(?<=www)\.)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LINE_ENDS = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"  # Python's whitespace that is not merely a width
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes a spreadsheet treat a text as a formula


def terminal(text: object) -> str:
    r"""One line of text that cannot control a terminal: whatever is not plainly printable is shown as its escape.

    Control characters, line ends, characters that redirect or hide text (bidirectional controls, zero widths) and lone surrogates
    are escaped. Whitespace of any width becomes a plain space.

    >>> print(terminal("a\x1b[2Jb\nc"), terminal("é"))
    a\x1b[2Jb\nc é
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def ascii_line(text: object) -> str:
    r"""As :func:`terminal`, for terminals of any encoding: non-ASCII characters are escaped too.

    >>> print(ascii_line("é"))
    \xe9
    """
    return "".join(c if c.isascii() else _escaped(c) for c in terminal(text))


def lines(text: object) -> str:
    r"""As :func:`terminal`, but line ends are kept.

    >>> print(lines("a\x1b\nb"))
    a\x1b
    b
    """
    return "\n".join(map(terminal, str(text).splitlines()))


def markdown(text: object) -> str:
    r"""One line of plain text for Markdown, in a paragraph or a table cell, and for the HTML rendered from it.

    >>> print(markdown("a|b <script>\n# *c*"))
    a\|b &lt;script&gt; \# \*c\*
    """
    plain = terminal(" ".join(str(text).split()))
    return "".join(_HTML.get(c, c) for c in _MARKDOWN.sub(r"\\\1", plain))


def code(text: object) -> str:
    """A Markdown code span that no backtick inside the text can end.

    >>> print(code("a `b`"))
    `` a `b` ``
    """
    plain = terminal(" ".join(str(text).split()))
    longest = max(map(len, re.findall("`+", plain)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {plain} {fence}" if longest else f"{fence}{plain}{fence}"


def html(text: object) -> str:
    r"""Plain text for HTML, also inside a quoted attribute; line ends are whitespace there anyway.

    >>> print(html("<b>\x1b&\u202e"))
    &lt;b&gt;\x1b&amp;\u202e
    """
    return _escape_html("".join(c if c in "\n\t" else terminal(c) for c in str(text)))


def label(text: object) -> str:
    r"""One line of text that matplotlib draws literally: not as a formula, and never hidden from a legend.

    >>> print(label("$a_b$"))
    \$a_b\$
    """
    plain = terminal(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain  # a legend leaves out what begins with one


def spreadsheet(text: object) -> str:
    """One line of text that a spreadsheet does not treat as a formula: a leading apostrophe is added where needed.

    >>> spreadsheet("=1+1"), spreadsheet("a")
    ("'=1+1", 'a')
    """
    plain = terminal(text)
    return f"'{plain}" if str(text).startswith(_FORMULA) else plain


def _escaped(character: str) -> str:
    if character.isspace() and character not in _LINE_ENDS:
        return " "
    return character.encode("unicode_escape").decode()
