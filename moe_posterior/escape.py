"""Names and messages made harmless for what they are shown in: one function for each kind of output.

Arms, data sets, routers and experts are named by whoever made them, and a log or a report may come from anywhere. So nothing that
is shown may steer a terminal, add markup, break a table, run text backwards or be taken for a formula.
"""

import re
from html import escape as _escape_html

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#]|:(?=//)|(?<=www)\.)")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LINE_ENDS = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"  # Python's blanks that are no mere width
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for one at the start of a text


def terminal(text: object) -> str:
    r"""One line of text that does nothing to a terminal: what is not plainly printable stands as its escape.

    Not printable are control characters, line ends, what directs or hides text (bidirectional controls, zero widths) and lone
    surrogates. Blanks of any width are plain ones.

    >>> print(terminal("a\x1b[2Jb\nc"), terminal("é"))
    a\x1b[2Jb\nc é
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def ascii_line(text: object) -> str:
    r"""As :func:`terminal`, for terminals of any encoding: whatever is not ASCII is escaped too.

    >>> print(ascii_line("é"))
    \xe9
    """
    return "".join(c if c.isascii() else _escaped(c) for c in terminal(text))


def lines(text: object) -> str:
    r"""As :func:`terminal`, but line ends stay.

    >>> print(lines("a\x1b\nb"))
    a\x1b
    b
    """
    return "\n".join(map(terminal, str(text).splitlines()))


def markdown(text: object) -> str:
    r"""One line of text that stays text in Markdown, in a paragraph or in a cell of a table, and in the HTML made of it.

    >>> print(markdown("a|b <script>\n# *c*"))
    a\|b &lt;script&gt; \# \*c\*
    """
    plain = terminal(" ".join(str(text).split()))
    return "".join(_HTML.get(c, c) for c in _MARKDOWN.sub(r"\\\1", plain))


def code(text: object) -> str:
    """A code span of Markdown, which no backtick within ends.

    >>> print(code("a `b`"))
    `` a `b` ``
    """
    plain = terminal(" ".join(str(text).split()))
    longest = max(map(len, re.findall("`+", plain)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {plain} {fence}" if longest else f"{fence}{plain}{fence}"


def html(text: object) -> str:
    r"""Text that stays text in HTML, also within a quoted attribute; line ends are blanks there anyway.

    >>> print(html("<b>\x1b&\u202e"))
    &lt;b&gt;\x1b&amp;\u202e
    """
    return _escape_html("".join(c if c in "\n\t" else terminal(c) for c in str(text)))


def label(text: object) -> str:
    r"""One line of text that matplotlib draws as it is: no formula, and never hidden from a legend.

    >>> print(label("$a_b$"))
    \$a_b\$
    """
    plain = terminal(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain  # a legend leaves out what begins with one


def spreadsheet(text: object) -> str:
    """One line of text that no spreadsheet takes for a formula: such a text gets an apostrophe in front.

    >>> spreadsheet("=1+1"), spreadsheet("a")
    ("'=1+1", 'a')
    """
    plain = terminal(text)
    return f"'{plain}" if str(text).startswith(_FORMULA) else plain


def _escaped(character: str) -> str:
    if character.isspace() and character not in _LINE_ENDS:
        return " "
    return character.encode("unicode_escape").decode()
